"""Sites: the submodule calls of a model, the places where a method can sit."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jpeft.errors import UserError, nearest

__all__ = ["Site", "Sites", "find", "layer_of", "layers", "matches", "path_of", "site_of", "sites"]

_LAYER = re.compile(r"(?:^|/)(?:layers?|blocks?|h)_(\d+)(?:/|$)")


class Site(NamedTuple):
    """One submodule call of a model.

    Attributes:
      path: the module's path, such as "encoder/layer_3/attention/query".
      layer: the number of the layer that it is in, or None; read from path parts such as `layer_3` or `blocks_3`.
      kind: the module's class, such as "Dense".
      params: the site's own parameters, as nested `jax.ShapeDtypeStruct`s.
      args: its positional arguments, arrays as `jax.ShapeDtypeStruct`s.
    """

    path: str
    layer: int | None
    kind: str
    params: Mapping[str, Any]
    args: tuple[Any, ...]


Sites = dict[str, Site]


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> Sites:
    """Lists every submodule call of a model, without computing anything.

    Args:
      model: any linen module.
      *args: what the model's `__call__` takes: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: likewise; flags such as `train=False` too.

    Returns:
      The sites by path, in the order in which the forward pass reaches them. A module that is called twice is listed
      with the arguments of its first call.
    """
    found: dict[str, Site] = {}

    def spy(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = path_of(context)
        if path and path not in found:
            found[path] = site_of(path, context.module, args)
        return call(*args, **kwargs)

    def trace(*arrays: Any) -> Any:
        leaves = iter(arrays)
        filled = [next(leaves) if _is_array(x) else x for x in flat]
        a, k = jax.tree.unflatten(treedef, filled)
        # Without jit, because `nn.jit` would trace the first of several equal modules only.
        with nn.intercept_methods(spy), jax.disable_jit():
            return model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, *a, **k)

    flat, treedef = jax.tree.flatten((args, kwargs))
    variables = jax.eval_shape(trace, *(x for x in flat if _is_array(x)))
    params = variables.get("params", {})
    return {path: site._replace(params=_subtree(params, path)) for path, site in found.items()}


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def path_of(context: nn.module.InterceptorContext) -> str:
    """The path of the module whose `__call__` this is; "" for other methods and for the root."""
    module = context.module
    if context.method_name != "__call__" or module.scope is None:
        return ""
    return "/".join(module.path)


def site_of(path: str, module: nn.Module, args: tuple) -> Site:
    """The site at a path, without its parameters."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, args)
    return Site(path, layer_of(path), type(module).__name__, {}, shapes)


def _subtree(tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for part in path.split("/"):
        tree = tree.get(part, {})
    return tree


def layer_of(path: str) -> int | None:
    """The layer number in a path: 3 for "encoder/layer_3/attention/query", None for "pooler"."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def layers(sites: Sites) -> tuple[int, ...]:
    """The layer numbers that occur among the sites, in ascending order."""
    return tuple(sorted({site.layer for site in sites.values() if site.layer is not None}))


def matches(pattern: str, path: str) -> bool:
    """Whether a path, or its end in whole parts, matches a regular expression; a UserError if it is none."""
    try:
        return re.fullmatch(rf"(?:.*/)?(?:{pattern})", path) is not None
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def find(sites: Sites, pattern: str, layers: Iterable[int] | None = None) -> tuple[Site, ...]:
    """The sites whose path, or the end of whose path, matches a regular expression.

    Args:
      sites: the sites of the model.
      pattern: matched against whole path parts from the end: "query", "query|value", "layer_[0-3]/attention/query".
      layers: only in these layers; each of them must have a match. None means everywhere.

    Returns:
      The matches in the order of the forward pass, at least one.

    Raises:
      UserError: if nothing matches, in all or in a layer asked for. A mistyped path is never silently a no-op.
    """
    hits = [site for path, site in sites.items() if matches(pattern, path)]
    if not hits:
        close = nearest(pattern.rsplit("/", 1)[-1], dict.fromkeys(path.rsplit("/", 1)[-1] for path in sites))
        raise UserError(f"pattern {pattern!r} matches no site of the model: {close}")
    if layers is None:
        return tuple(hits)
    wanted = set(layers)
    for layer in sorted(wanted - {site.layer for site in hits}):
        have = sorted({site.layer for site in hits if site.layer is not None})
        span = f"layers {have[0]} to {have[-1]} have" if have else "its matches are in no layer"
        raise UserError(f"layer {layer} has no site that matches {pattern!r}: {span}")
    return tuple(site for site in hits if site.layer in wanted)
