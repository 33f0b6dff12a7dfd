"""Whether values from JSON are of the types that Python's annotations name."""

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

__all__ = ["MAX_FLOAT32", "in_words", "is_a", "misfit"]

MAX_FLOAT32 = 3.4e38
_WORDS = {
    bool: "true or false", int: "an integer", float: "a finite number", str: "a string", NoneType: "null",
    Sequence[int]: "a list of integers", Sequence: "a list", Mapping: "an object",
}  # fmt: skip


def is_a(value: Any, kind: Any) -> bool:
    """Whether an option is of a type, as JSON has them: true is not 1, 1 is a float, and floats are finite in float32.

    Args:
      value: a list or tuple passes for a `Sequence`.
      kind: a type, `Sequence[...]` or `Mapping[...]`; what a mapping holds is not looked at.
    """
    origin = get_origin(kind) or kind
    if origin is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return abs(value) <= MAX_FLOAT32  # an int of JSON may be beyond all floats; nan compares as false
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Sequence:
        (of,) = get_args(kind)
        of = get_args(of) if isinstance(of, UnionType) else (of,)
        return isinstance(value, list | tuple) and all(any(is_a(x, k) for k in of) for x in value)
    return isinstance(value, origin)


def in_words(kind: Any) -> str:
    """What a kind of `is_a` is called in a message: "a list of integers"."""
    return _WORDS.get(kind, _WORDS.get(get_origin(kind) or kind, str(kind)))


def misfit(value: Any, kind: Any, name: str = "") -> str:
    """What is wrong with a value, in a few words; "" if it is of a kind.

    Args:
      value: as `json.loads` gives it.
      kind: a type (True is no int, 1 is a float too), `list[int]`, `tuple[int, str]`, `tuple[str, ...]` (both are lists
        in JSON), `dict[str, int]`, `str | None` or `Any`; {name: kind} for an object with these entries and perhaps
        others; [kind] for a list of such. An entry that may be None may be missing.
      name: of the value, for the message.

    >>> misfit({"a": [1, True]}, {"a": list[int]})
    'its a.1 is True'
    >>> misfit({"a": [1, 2]}, {"a": list[int], "b": str, "c": str | None})
    'it has no b'
    """
    before = f"{name}." if name else ""
    if isinstance(kind, UnionType):
        return "" if any(not misfit(value, each) for each in get_args(kind)) else _told(value, name)
    if isinstance(kind, Mapping) and isinstance(value, dict):
        lacking = next((key for key, of in kind.items() if key not in value and misfit(None, of)), None)
        if lacking is not None:
            return f"it has no {before}{lacking}"
    parts = _parts(value, kind)
    if parts is None:
        return _told(value, name)
    return next((told for key, (part, of) in parts.items() if (told := misfit(part, of, f"{before}{key}"))), "")


def _parts(value: Any, kind: Any) -> dict[Any, tuple[Any, Any]] | None:
    """The parts of a value with the kind of each; None if the value is not of the kind, whatever its parts are."""
    of, args = get_origin(kind) or kind, get_args(kind)
    if isinstance(kind, Mapping):
        return {key: (value.get(key), each) for key, each in kind.items()} if isinstance(value, dict) else None
    if of is dict:
        each = args[1] if args else Any
        return {key: (part, each) for key, part in value.items()} if isinstance(value, dict) else None
    if isinstance(kind, list) or of in (list, tuple):
        if not isinstance(value, list):
            return None
        if of is tuple and Ellipsis not in args:
            return dict(enumerate(zip(value, args, strict=True))) if len(value) == len(args) else None
        each = kind[0] if isinstance(kind, list) else args[0]
        return {i: (part, each) for i, part in enumerate(value)}
    if of is Any:
        return {}
    right = isinstance(value, int | float if of is float else of) and (of is bool or not isinstance(value, bool))
    return {} if right else None


def _told(value: Any, name: str) -> str:
    return f"its {name} is {value!r:.60}" if name else f"it is {value!r:.60}"
