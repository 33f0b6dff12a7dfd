"""Rows and columns out of JSON lines, CSV, TSV, parquet and CoNLL files, with errors that name the file and the row.

A CoNLL file has a word a line, with its tag in the last column, and empty lines between sentences: its rows are
{"words": [...], "tags": [...]}.
"""

import contextlib
import csv
import gzip
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.data.task import HIDDEN, Task

__all__ = [
    "ENDINGS", "INSTEAD", "attempts", "between_spaces", "columns", "is_unicode", "is_written_list", "rows", "text_of",
    "words_of",
]  # fmt: skip

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".conll", ".conll.gz")


def rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a file as dicts by column; the ending of its name says how to read it.

    Raises:
      UserError: if the file or a row cannot be read, naming the row, counted from 1 after any header.
    """
    for row in attempts(file):
        if isinstance(row, UserError):
            raise row
        yield row


def attempts(file: Path, stream: BinaryIO | None = None) -> Iterator[Mapping[str, Any] | UserError]:
    """Yields the rows of a file, and in the place of a row that cannot be read an error that says why.

    Args:
      file: as for `rows`.
      stream: JSON lines to read in place of the file, which then is only a name.

    Raises:
      UserError: if the file itself cannot be read, or at a row of CSV that is not UTF-8 or whose quotes do not close:
        it leaves open where the next one begins.
    """
    ending = "jsonl" if stream is not None else file.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file) as table:
                _distinct(file, table.schema_arrow.names)
                for some in table.iter_batches():
                    yield from some.to_pylist()
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise UserError(f"{file} is not a readable parquet file ({type(error).__name__})") from error
    elif ending == "jsonl":
        for number, line in enumerate(_lines(file, stream), start=1):
            yield line if isinstance(line, UserError) else _object(line, f"{file}, row {number}")
    elif ending == "conll":
        yield from _sentences(file)
    else:
        yield from _table(file, "," if ending == "csv" else "\t")


def columns(
    file: Path,
    task: Task,
    hidden: bool,
    label: str = "label",
    answer: Callable[[Mapping[str, Any], int, Any], Any] | None = None,
) -> dict[str, list[Any]]:
    """Reads and checks the texts and labels of a file.

    Args:
      file: as for `rows`.
      task: says which columns hold text, and what labels there are: ids, or for regression values.
      hidden: whether labels may be absent, or -1.
      label: the column with the label.
      answer: (row, its number, its first text) -> its label; None reads the id or value in the column.

    Returns:
      {text column: list of str, ..., "label": list of ids or values, "idx": list of int}. A hidden label is -1. Of
      tagging, the text column is a list of lists of words.

    Raises:
      UserError: if a row is not what the task says. Rows are counted from 1, after the header.
    """
    found: dict[str, list[Any]] = {name: [] for name in (*task.text, "label", "idx")}
    read = words_of if task.answers.by_token else text_of
    without = 0
    for number, row in enumerate(rows(file), start=1):
        where = f"{file}, row {number}"
        for name in task.text:
            found[name].append(read(row, name, where))
        found["idx"].append(_index(row.get("idx"), number - 1))
        if answer is not None:
            found["label"].append(answer(row, number, found[task.text[0]][-1]))
            continue
        if label not in row and not hidden:
            raise UserError(f"{where}: no column {label!r}; {nearest(label, row)}")
        found["label"].append(_label(task, row.get(label, -1), hidden, where))
        without += label not in row
    if not found["label"]:
        raise UserError(f"{file} has no rows")
    # Where -1 is a value like any other, it cannot stand for a label that is not there.
    if 0 < without < len(found["label"]) and not task.labels and task.label_range[0] <= HIDDEN:
        raise UserError(
            f"{file}: {without:,} of {len(found['label']):,} rows have no {label!r}: all of them must have one, or none"
        )
    return found


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in a column of a row.

    Raises:
      UserError: if there is no such column, or it does not hold text.
    """
    if name not in row:
        raise UserError(f"{where}: no column {name!r}; {nearest(name, row)}")
    if not isinstance(row[name], str):
        raise UserError(f"{where}: {name!r} is {row[name]!r:.60}, which is not text")
    if not is_unicode(row[name]):
        raise UserError(f"{where}: {name!r} holds half of a surrogate pair, which is not a character")
    return row[name]


def words_of(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    """The words in a column of a row: a list of them, or text with spaces between.

    Raises:
      UserError: if there is no such column, no word in it, or something else.
    """
    if not isinstance(row.get(name), list):
        text = text_of(row, name, where)
        if is_written_list(text):
            raise UserError(f"{where}: {name!r} is {text!r:.60}, a list written as text: {INSTEAD.format('spaces')}")
        words = between_spaces(text)
    else:
        words = row[name]
        for word in words:
            if not isinstance(word, str) or not word.strip() or not is_unicode(word):
                raise UserError(f"{where}: {name!r} holds {word!r:.60}, which is not a word")
    if not words:
        raise UserError(f"{where}: {name!r} has no words")
    return words


INSTEAD = "write it with {} between, or as a list in a .jsonl or .parquet file"


def is_written_list(text: str) -> bool:
    """Whether text is what Python or NumPy prints for a list of strings or numbers, as CSV files may have it."""
    return re.fullmatch(r"\[\s*(['\"\d].*)?\]", text.strip(), re.DOTALL) is not None


def between_spaces(text: str) -> list[str]:
    """What stands between spaces and tabs; other spaces, such as those inside of a number, are part of a word."""
    return [part for part in re.split(r"[ \t]+", text.strip(" \t\r\n")) if part]


def _object(line: str, where: str) -> Mapping[str, Any] | UserError:
    try:
        row = json.loads(line, object_pairs_hook=files.once)
    except json.JSONDecodeError as error:
        return UserError(f"{where}: not JSON, {error.msg} at column {error.colno}")
    # A name that is there twice, a number of thousands of digits, brackets without end.
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not JSON that can be read ({error})")
    return row if isinstance(row, dict) else UserError(f"{where}: not a JSON object")


def is_unicode(text: str) -> bool:
    """Whether text has no half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _index(value: Any, otherwise: int) -> int:
    if isinstance(value, float) and value.is_integer():  # pandas' integers, in a column that lacks some
        value = int(value)
    text = str(value) if isinstance(value, int | str) else ""
    return int(text) if len(text) < 19 and text.isdecimal() and text.isascii() else otherwise


MOST = 1e18  # a value of a regression; the square of a larger one is not finite in float32


def _label(task: Task, value: Any, hidden: bool, where: str) -> int | float:
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)  # Python reads 1_000
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if number == -1 and hidden:
        return -1 if task.labels else -1.0
    if not task.labels:
        low, high = task.label_range
        if not low <= number <= high or abs(number) > MOST:
            within = f" up to {MOST:g}" if math.isinf(low) else f" from {low:g} to {high:g}"
            raise UserError(f"{where}: label {value!r} is not a number{within}")
        return number
    if number not in range(len(task.labels)):
        ids = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
        raise UserError(f"{where}: label {value!r} is none of {ids}")
    return int(number)


def _sentences(file: Path) -> Iterator[Mapping[str, list[str]] | UserError]:
    words: list[str] = []
    tags: list[str] = []
    wrong: UserError | None = None
    number, width = 1, 0
    for line in itertools.chain(_lines(file), [""]):
        if isinstance(line, UserError):
            wrong = wrong or line
        elif cells := between_spaces(line):
            if cells[0] == "-DOCSTART-":
                continue
            width = width or len(cells)
            if len(cells) < 2:
                wrong = wrong or UserError(f"{file}, row {number}: {line.strip()!r:.60} has no tag")
            if len(cells) != width:
                told = f"{line.strip()!r:.60} has {len(cells)} columns, the first line {width}"
                wrong = wrong or UserError(f"{file}, row {number}: {told}")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words or wrong:
            counted = [str(i + 1) for i in range(len(words))], [str(i) for i in range(len(words))]
            if width > 2 and len(words) > 2 and words in counted:
                told = "the first column counts the words: expected the words themselves there"
                wrong = wrong or UserError(f"{file}, row {number}: {told}")
            yield wrong or {"words": words, "tags": tags}
            words, tags, wrong, number = [], [], None, number + 1


def _table(file: Path, separator: str) -> Iterator[Mapping[str, str] | UserError]:
    lines = _lines(file)
    # A quoted field of a CSV file may hold line breaks, which the reader wants to see.
    fields = csv.reader(map(_must, lines), strict=True) if separator == "," else map(_cells, lines)
    header: Any = None
    number = 0
    try:
        for number, row in enumerate(fields):
            if header is None:
                header = _distinct(file, _must(row))
                if other := re.search(r"[;,\t]", header[0]) if len(header) == 1 else None:
                    told = f"the header is one column with {other[0]!r} in it: columns are separated by {separator!r}"
                    raise UserError(f"{file}: {told}")
            elif isinstance(row, UserError):
                yield row
            elif len(row) != len(header):
                yield UserError(f"{file}, row {number}: {len(row)} fields where the header has {len(header)}")
            elif row == header and len(row) > 1:  # of files put one behind the other
                yield UserError(f"{file}, row {number}: the header again")
            else:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        told = "a lone carriage return ends a line: expected line feeds" if "new-line" in str(error) else error
        raise UserError(f"{file}, row {number + 1}: {told}") from error


def _distinct(file: Path, header: list[str]) -> list[str]:
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{file}: column {twice[0]!r} occurs twice")
    return header


def _cells(line: str | UserError) -> list[str] | UserError:
    return line if isinstance(line, UserError) else line.rstrip("\r\n").split("\t")


def _must(found: Any) -> Any:
    if isinstance(found, UserError):
        raise found
    return found


def _lines(file: Path, given: BinaryIO | None = None) -> Iterator[str | UserError]:
    # Decoded line by line, to know the line that is not UTF-8; and split at line feeds only.
    number, blank = 0, []
    try:
        with _open(file, given) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    text = UserError(f"{file}, line {number}: not UTF-8; save it as such, in Excel 'CSV UTF-8'")
                else:
                    if not text.strip(" \r\n"):  # at the end of a file such lines mean nothing
                        blank.append(text)
                        continue
                yield from blank
                blank.clear()
                yield text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}, after line {number}: cannot be read ({error})") from error


def _open(file: Path, given: BinaryIO | None) -> Any:
    if given is not None:
        return contextlib.nullcontext(given)
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")
