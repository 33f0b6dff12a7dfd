"""Files that are whole or absent: written beside their place and moved there."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["append_json", "read_json", "write_json", "write_text"]


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
