"""A file of answers that grows by parts, and goes on where it was left."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from jpeft.core import files, locks
from jpeft.core.errors import UserError

__all__ = ["Answers", "held"]

PROGRESS = "progress of predictions"  # the kind of the record


class Answers:
    """Where answers go. What was written and noted stays; what was written after the last note is cut off again.

    Args:
      output: the file; `<output>.errors.jsonl` beside it lists what could not be answered.
      identity: JSON, of what the answers depend on. Its "input" is empty if that cannot be read twice.

    Attributes:
      output: see above.
      errors: the file beside it.
      unread: rows listed there.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]):
        self.output, self.errors = output, output.with_name(f"{output.name}.errors.jsonl")
        self._note, self._identity = output.with_name(f".{output.name}.progress.json"), identity
        self._hashes = {path: hashlib.sha256() for path in (self.output, self.errors)}
        self.unread = 0

    def begin(self) -> int:
        """The number of rows that are done already.

        Raises:
          UserError: if the output is another one's, or is not as it was left.
        """
        if not self._note.is_file():
            for path in (self.output, self.errors):
                if path.exists():
                    raise UserError(f"--output: {path} is there already: choose another name, or delete it")
            self._write(0)
            self.output.touch()
            return 0
        noted = files.read_record(self._note, PROGRESS)
        started_again = f"choose another name, or delete it and {self._note}"
        if noted["of"] != self._identity and noted["rows"]:
            raise UserError(
                f"--output: {self.output} was begun with another model, input, columns or device: {started_again}"
            )
        self.unread = noted["unread"]
        for path, size in ((self.output, noted["output"]), (self.errors, noted["errors"])):
            if _size(path) < size:
                raise UserError(f"--output: {path} was cut or deleted since it was begun: {started_again}")
            if _size(path) > size:
                os.truncate(path, size)
            if path.exists():
                with path.open("rb") as file:
                    self._hashes[path] = hashlib.file_digest(file, "sha256")
        if self._hexes() != noted["hashes"]:
            raise UserError(f"--output: {self.output} was edited since it was begun: {started_again}")
        self.output.touch()
        if not _size(self.errors):
            self.errors.unlink(missing_ok=True)
        return noted["rows"]

    def add(self, lines: str, errors: str, rows: int, unread: int) -> None:
        """Appends answers and errors, and notes that so many rows are done."""
        self.unread += unread
        for path, text in ((self.output, lines), (self.errors, errors)):
            if text:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                self._hashes[path].update(text.encode())
        self._write(rows)

    def end(self) -> None:
        """Forgets the note: the output is whole."""
        self._note.unlink(missing_ok=True)

    def _hexes(self) -> list[str]:
        return [found.hexdigest() for found in self._hashes.values()]

    def _write(self, rows: int) -> None:
        if not self._identity["input"]:
            return  # the standard input does not come twice
        noted = {"output": _size(self.output), "errors": _size(self.errors), "hashes": self._hexes()}
        files.write_record(self._note, PROGRESS, {"of": self._identity, "rows": rows, "unread": self.unread, **noted})


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Holds an output against other processes, where the file system has locks.

    Raises:
      UserError: if another process holds it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    with path.open("a") as file:
        if not _alone(file, path):
            raise UserError(f"--output: another process writes {output}: wait until it is done")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _alone(file: TextIO, path: Path) -> bool:
    try:
        if not locks.take(file):
            return False
    except OSError:  # a file system without locks
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:  # whoever held it has deleted it meanwhile
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
