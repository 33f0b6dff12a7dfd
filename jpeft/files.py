"""Files that are whole or absent: written beside their place and moved there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["append_json", "keep_lines", "read_json", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically. NaN and Inf are refused: they are no JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Appends one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def keep_lines(path: Path, keep: Callable[[Any], bool]) -> None:
    """Rewrites a file of JSON lines with the values that `keep` wants; a line cut short by a crash is dropped."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keep(value):
            kept.append(line + "\n")
    write_text(path, "".join(kept))
