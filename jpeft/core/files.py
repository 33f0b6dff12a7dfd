"""Atomic file writes: a file is written under a temporary name, then renamed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.tree import empty_paths, flatten, unflatten

__all__ = ["append_json", "keep_lines", "read_json", "read_leaves", "write_json", "write_leaves", "write_text"]


EMPTY = "empty"  # the metadata entry that lists empty dicts, which safetensors cannot hold


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically, creating the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically. NaN and Inf are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Appends one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def keep_lines(path: Path, keep: Callable[[Any], bool]) -> None:
    """Rewrites a file of JSON lines with the values that `keep` accepts. A line cut short by a crash is dropped."""
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


def write_leaves(path: str | Path, leaves: Mapping[str, Any], about: Mapping[str, str] | None = None) -> None:
    """Writes a nested dict of arrays as one safetensors file, atomically.

    Args:
      path: the file to write; its folder is created if needed.
      leaves: the arrays. Empty dicts are stored too, as names in the metadata.
      about: additional metadata.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    tensors = {":".join(keys): np.asarray(x) for keys, x in flatten(leaves).items()}
    empty = {EMPTY: json.dumps([":".join(keys) for keys in paths])} if (paths := empty_paths(leaves)) else {}
    save_file(tensors, beside, metadata={"format": "jpeft", **empty, **(about or {})})
    os.replace(beside, path)


def read_leaves(path: str | Path) -> dict[str, Any]:
    """The inverse of `write_leaves`; returns JAX arrays.

    Raises:
      UserError: if the file does not exist or is not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    leaves: dict[tuple[str, ...], Any] = {}
    try:
        for key, x in load_file(path).items():
            leaves[tuple(key.split(":"))] = jax.numpy.asarray(x)
        with safe_open(path, "np") as file:
            empty = json.loads((file.metadata() or {}).get(EMPTY, "[]"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a safetensors file of leaves: {error}") from None
    for key in empty:
        leaves[tuple(key.split(":"))] = {}
    return unflatten(leaves)
