"""Nested dicts of arrays: paths, parts and unions. JAX's own tree functions do the rest."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from jpeft.core.errors import UserError, nearest
from jpeft.core.quantised import dense, is_quantised

__all__ = ["at", "count", "empty_paths", "flatten", "get", "num_bytes", "replace", "split", "unflatten", "union"]


def flatten(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """{"a": {"b": x}} to {("a", "b"): x}; tuples, because the keys of peft leaves are themselves paths.

    Empty dicts are left out: `empty_paths` lists them.
    """
    return flatten_dict(tree)


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return unflatten_dict(dict(flat))


def empty_paths(tree: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The paths of the empty dicts below the root. They have a meaning: a site may have only shared leaves."""
    if not tree:
        return []
    return [path for path, x in flatten_dict(tree, keep_empty_nodes=True).items() if x is empty_node]


def at(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at "a/b/c", quantised kernels in it dequantised, for whoever computes with it.

    Raises:
      UserError: if there is none.
    """
    return dense(get(tree, path))


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at "a/b/c", as it is.

    Raises:
      UserError: if there is none.
    """
    found = tree
    for part in path.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            have = nearest(part, found) if isinstance(found, Mapping) and found else "expected those of the whole model"
            raise UserError(f"the parameters have no {path!r}: {have}")
        found = found[part]
    return found


def replace(tree: Mapping[str, Any], path: str, fn: Callable[[Any], Any]) -> dict[str, Any]:
    """A new tree with fn applied to the leaf or subtree at "a/b/c", as `at` gives it; everything else is shared.

    Raises:
      UserError: if there is none.
    """
    return _put(tree, path, fn(at(tree, path)))


def _put(tree: Mapping[str, Any], path: str, new: Any) -> dict[str, Any]:
    head, _, rest = path.partition("/")
    return {**tree, head: _put(tree[head], rest, new) if rest else new}


def split(tree: Mapping[str, Any], belongs: Callable[[tuple[str, ...]], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trees: the leaves whose path belongs, and the others. Empty dicts stay with the first."""
    inside: dict[tuple[str, ...], Any] = {}
    outside: dict[tuple[str, ...], Any] = {}
    for path, x in flatten_dict(tree, keep_empty_nodes=True).items() if tree else ():
        (inside if x is empty_node or belongs(path) else outside)[path] = x
    return unflatten(inside), unflatten(outside)


def union(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the leaves of both; the inverse of `split`. Where both have a path, the second wins."""
    merged = dict(first)
    for name, x in second.items():
        old = merged.get(name)
        merged[name] = union(old, x) if isinstance(old, Mapping) and isinstance(x, Mapping) else x
    return merged


def count(tree: Any) -> int:
    """The number of entries in all leaves; of a quantised kernel, those that it stands for."""
    return sum(x.size for x in jax.tree.leaves(tree, is_leaf=is_quantised))


def num_bytes(tree: Any) -> int:
    """The number of bytes in all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
