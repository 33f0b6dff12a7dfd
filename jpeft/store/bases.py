"""Which base modules were trained on, by their description: its weights, its shape, and how it is quantised."""

from collections.abc import Mapping
from typing import Any

from jpeft.core.tree import flatten, split

__all__ = ["codes", "frozen", "identity", "told", "unquantised"]

CODES = ("quantise", "quantise_except")


def identity(description: Mapping[str, Any]) -> dict[str, str]:
    """What a base must have in common with that of the description: all that is known of it but its name."""
    return {name: value for name, value in description["base"].items() if name != "name" and value is not None}


def codes(description: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """How the base is quantised: the kind, and the pattern of what is not."""
    kind, exceptions = (description["base"].get(name) for name in CODES)
    return kind, exceptions


def unquantised(identity: Mapping[str, str], fingerprint: str) -> dict[str, str]:
    """The identity of the same base before it was quantised, when its weights had this fingerprint."""
    return {**{name: x for name, x in identity.items() if name not in CODES}, "fingerprint": fingerprint}


def frozen(params: Mapping[str, Any], kept: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """The parameters less those that a folder keeps, and less these top-level names."""
    own = flatten(kept["params"])
    return split(params, lambda path: path in own or path[0] in without)[1]


def told(kind: str | None) -> str:
    """What a base is, in an error message."""
    return "a base that is not quantised" if kind is None else f"a base quantised as {kind!r}"
