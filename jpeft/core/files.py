"""Atomic file writes, and reads that trust nothing.

A file is written under a temporary name, then renamed. Records and leaves carry a hash of their contents, so a file
that was damaged, cut short or edited is refused with one line.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.schema import misfit
from jpeft.core.tree import empty_paths, flatten, unflatten

__all__ = [
    "Kind",
    "append_json",
    "file_hash",
    "keep_lines",
    "once",
    "read_json",
    "read_leaves",
    "read_record",
    "read_safetensors",
    "read_tensors",
    "write_json",
    "write_leaves",
    "write_record",
    "write_safetensors",
    "write_text",
]  # fmt: skip

FORMAT = "jpeft"  # the metadata entry of our safetensors files: JSON with all of the following
EMPTY = "empty"  # the paths of empty dicts, which safetensors cannot hold
RESERVED = "__metadata__"  # the name in safetensors files that no array can have
HASH = "sha256"  # the entry, of a record or of metadata, with the hash of all the rest
CHANGED = f"was changed or damaged after it was written, its contents do not match its {HASH}: restore or delete it"
KIND = "kind"  # the entry that says what a record is of


class Kind(NamedTuple):
    """What a record is of.

    Attributes:
      name: in words, as the record has it.
      fields: what it has to hold, a kind of `jpeft.core.schema.misfit`.
    """

    name: str
    fields: Mapping[str, Any]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically, creating the folder if needed.

    Raises:
      UserError: if the path is a folder.
    """
    beside = _beside(path)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _beside(path: Path) -> Path:
    """The temporary name of a file, in its folder, which is made if need be."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is to be written: delete it or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.part")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically. NaN and Inf are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      UserError: if it does not exist or is not JSON.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # not UTF-8 and integers of thousands of digits are among them
        raise UserError(f"{path} is not JSON: {error}") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; of two equal names, `json` would drop the first.

    Raises:
      ValueError: if a name occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return found


def write_record(path: Path, kind: str | Kind, fields: Mapping[str, Any]) -> None:
    """Writes a JSON object with its kind and a hash of its contents, for `read_record`."""
    name = kind if isinstance(kind, str) else kind.name
    named = json.loads(json.dumps({KIND: name, **fields}, allow_nan=False))  # as it will be read: keys are strings
    write_json(path, {**named, HASH: _json_hash(named)})


def read_record(path: Path, kind: str | Kind) -> dict[str, Any]:
    """The fields that `write_record` wrote.

    Raises:
      UserError: if the file does not exist, is not such a record, was changed since it was written, or lacks what its
        kind has to hold, as after a change by a program that knows the hash.
    """
    name, fields = (kind, {}) if isinstance(kind, str) else kind
    record = read_json(path)
    if not isinstance(record, dict) or record.get(KIND) != name or not isinstance(record.get(HASH), str):
        raise UserError(f"{path} is not a {name} of this version of jpeft")
    written = record.pop(HASH)
    if written != _json_hash(record):
        raise UserError(f"{path} {CHANGED}")
    del record[KIND]
    if wrong := misfit(record, fields):
        raise UserError(f"{path} is not a {name} of this version of jpeft: {wrong}")
    return record


def _json_hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def append_json(path: Path, value: Any) -> None:
    """Appends one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def keep_lines(path: Path, keep: Callable[[Any], bool]) -> None:
    """Rewrites a file of JSON lines with the objects that `keep` accepts.

    A line that is no such object, or that `keep` cannot judge, is dropped: a crash may have cut it short.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if keep(json.loads(line)):
                kept.append(line + "\n")
        except (ValueError, RecursionError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def write_leaves(path: str | Path, leaves: Mapping[str, Any], about: Mapping[str, str] | None = None) -> None:
    """Writes a nested dict of arrays as one safetensors file, atomically.

    Args:
      path: the file to write; its folder is created if needed.
      leaves: the arrays. Empty dicts are stored too, as names in the metadata. Keys are joined by ":", so {"a:b": x}
        is read as {"a": {"b": x}}.
      about: additional metadata.

    Raises:
      UserError: if it is not a nested dict of numbers with text as keys, two leaves have one name, or the path is a
        folder.
    """
    if not isinstance(leaves, Mapping):
        raise UserError(f"expected a nested dict of arrays, got {type(leaves).__name__}")
    flat, empty = flatten(leaves), empty_paths(leaves)
    _check_names([*flat, *empty])
    tensors = {":".join(keys): _plain(x) for keys, x in flat.items()}
    for keys, x in flat.items():
        if isinstance(x, list | tuple):
            name = ":".join(keys)
            raise UserError(f"{name} is a {type(x).__name__}, which would be read back as one array: use a dict")
    for name, x in tensors.items():
        if x.dtype.kind not in "biufV":
            raise UserError(f"{name} is not an array of numbers: {x!r:.60}")
    described = {"about": dict(about or {}), EMPTY: [":".join(keys) for keys in empty]}
    described[HASH] = _tensor_hash(tensors, described)
    # In one entry: safetensors writes several in any order, and equal leaves should give equal files.
    write_safetensors(path, tensors, {FORMAT: json.dumps(described, sort_keys=True)})


def _check_names(paths: Sequence[tuple[Any, ...]]) -> None:
    """Raises a UserError if paths, joined by ":", are not the names of the leaves of one tree."""
    names: set[str] = set()
    for keys in paths:
        for key in keys:
            if not isinstance(key, str):
                raise UserError(f"the keys of leaves must be text, got {key!r:.60}")
        name = ":".join(keys)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the key {name!r:.60} cannot be written as UTF-8") from None
        if name == RESERVED:
            raise UserError(f"the key {name!r} has a meaning of its own in safetensors files: choose another")
        if name in names:
            raise UserError(f"two leaves have the name {name!r:.60} once their keys are joined by ':': rename one")
        names.add(name)
    inner = {name[:at] for name in names for at, letter in enumerate(name) if letter == ":"}
    if both := next((name for name in names if name in inner), None):
        raise UserError(f"{both!r:.60} is a leaf and holds others, once keys are joined by ':': rename one")


def _plain(x: Any) -> np.ndarray:
    """A contiguous NumPy array in the byte order of the machine, as a file has it."""
    x = np.asarray(x, order="C")
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays by name as a safetensors file, atomically; its folder is created if needed.

    Raises:
      UserError: if the path is a folder.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    beside = _beside(path)
    beside.touch()
    mode = beside.stat().st_mode
    try:
        save_file({name: np.asarray(x, order="C") for name, x in tensors.items()}, beside, metadata=dict(metadata))
    except SafetensorError as error:  # a full disk, for one
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    beside.chmod(mode)  # safetensors makes files that only their owner can read
    os.replace(beside, path)


def read_leaves(path: str | Path) -> dict[str, Any]:
    """The inverse of `write_leaves`; returns JAX arrays, and NumPy's where JAX would cut 64 bits down to 32.

    Those are float64, and integers that 32 bits cannot hold.

    Raises:
      UserError: as `read_tensors`.
    """
    tensors, described = _read(path)
    leaves: dict[tuple[str, ...], Any] = {tuple(k.split(":")): _as_jax(x) for k, x in tensors.items()}
    try:
        return unflatten(leaves | {tuple(key.split(":")): {} for key in described[EMPTY]})
    except (ValueError, AttributeError, TypeError) as error:  # names that are no tree
        raise UserError(f"{path} is not a safetensors file of leaves: {error}") from None


def _as_jax(x: np.ndarray) -> Any:
    """A JAX array, but where JAX would cut 64 bits down to 32: those stay NumPy's, unless they are small integers."""
    whole = jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
    if not whole and x.dtype.kind == "f":  # by type and not by value: the leaves of one tree should be alike
        return x
    y = jax.numpy.asarray(x)
    return y if whole or np.array_equal(y, x) else x


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays that `write_leaves` wrote, by their paths joined by ":", and what it was told about them.

    Raises:
      UserError: if the file does not exist, was not written by `write_leaves`, or was changed since.
    """
    tensors, described = _read(path)
    return tensors, described["about"]


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of any safetensors file by name, and its metadata.

    Raises:
      UserError: if it does not exist or is not such a file; sizes are held against its length before it is read.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:  # the latter where NumPy lacks a type
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tensors, metadata = read_safetensors(path)
    try:
        described = json.loads(metadata.get(FORMAT, "null"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors file of leaves: {error}") from None
    if not isinstance(described, dict) or HASH not in described:
        raise UserError(f"{path} is not a safetensors file of leaves: it does not carry their {HASH}")
    if described.pop(HASH) != _tensor_hash(tensors, described):
        raise UserError(f"{path} {CHANGED}")
    return tensors, described


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, HASH).hexdigest()


def _tensor_hash(tensors: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.shape} {x.dtype}\n".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
