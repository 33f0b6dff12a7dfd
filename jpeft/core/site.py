"""Sites: the submodule calls of a model, where a method can be placed."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from jpeft.core import tree
from jpeft.core.errors import UserError, nearest

__all__ = [
    "ALL",
    "Site",
    "Sites",
    "check_linen",
    "check_unboxed",
    "describe",
    "find",
    "in_order",
    "layer_of",
    "layers",
    "matches",
    "path_of",
    "site_of",
    "sites",
    "stack_axes",
    "stack_of",
    "within_layer",
]

ALL = ".*"  # the pattern for every suitable site
_ESCAPED = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # what has no meaning as a bracket or repeat
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_LAYER = re.compile(r"(?:^|/)(?:layers?|blocks?|h)_(\d+)(?:/|$)")

RESERVED = ("shared", "stacked", "fixed")  # keys of leaves (core/transform.py), where the paths of sites are


class Site(NamedTuple):
    """One submodule call of a model.

    Attributes:
      path: the module's path, such as "encoder/layer_3/attention/query".
      layer: the number of its layer, or None; read from path parts such as `layer_3` or `blocks_3`.
      kind: the module's class, such as "Dense".
      params: the site's own parameters as one call sees them, nested `jax.ShapeDtypeStruct`s.
      args: its positional arguments, with arrays as `jax.ShapeDtypeStruct`s.
      out: its output, with arrays as `jax.ShapeDtypeStruct`s.
      stack: the leading axes that `nn.scan` or `nn.vmap` adds to those parameters: (48,) for the body of a scan over 48
        layers, () elsewhere. None if the added axes are not leading.
      head: whether it belongs to the model's head, as named by the model's attribute `HEAD`.
    """

    path: str
    layer: int | None
    kind: str
    params: Mapping[str, Any]
    args: tuple[Any, ...]
    out: Any = None
    stack: tuple[int, ...] | None = ()
    head: bool = False


Sites = dict[str, Site]


def sites(model: nn.Module, *args: Any, **kwargs: Any) -> Sites:
    """Lists every submodule call of a model, without computing anything.

    Args:
      model: any linen module. Its attribute `HEAD`, if present, names the submodules of its head.
      *args: positional arguments of the model's `__call__`: arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: its keyword arguments, including flags such as `train=False`, and `method` for a method other than
        `__call__`.

    Returns:
      The sites by path, in the order in which the forward pass reaches them. A module that is called twice is listed
      with the arguments of its first call.

    Raises:
      UserError: if the model is not a linen module.
    """
    check_linen(model)
    head = getattr(model, "HEAD", ())
    head = (head,) if isinstance(head, str) else tuple(head)
    found: dict[str, Site] = {}
    seen: dict[str, Any] = {}  # the parameters of each module, as its own call sees them

    def spy(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path, module = path_of(context), context.module
        if not path or path in found:
            return call(*args, **kwargs)
        args, kwargs = in_order(module, args, kwargs)
        found[path] = site_of(path, module, args)
        out = call(*args, **kwargs)
        found[path] = found[path]._replace(out=_shapes(out))
        seen[path] = _shapes(nn.unbox(dict(module.variables.get("params", {}))))
        return out

    def trace(*arrays: Any) -> Any:
        leaves = iter(arrays)
        filled = [next(leaves) if _is_array(x) else x for x in flat]
        a, k = jax.tree.unflatten(treedef, filled)
        with nn.intercept_methods(spy):
            return model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, *a, **k)

    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = [x for x in flat if _is_array(x)]
    params = nn.unbox(jax.eval_shape(trace, *arrays)).get("params", {})
    # `nn.jit` traces only the first of several equal modules. Without jit each is, and so is each step of a loop, which
    # takes long.
    if any(not _visited(path, found) for path in tree.flatten(params)):
        found.clear()
        seen.clear()
        with jax.disable_jit():
            jax.eval_shape(trace, *arrays)
    return {
        path: site._replace(
            params=seen[path] or _subtree(params, path),
            stack=_stack(path, seen, params),
            head=path.split("/")[0] in head,
        )
        for path, site in found.items()
    }


def _visited(path: tuple[str, ...], found: Mapping[str, Site]) -> bool:
    """Whether a parameter is the model's own, or the very module that has it was called."""
    return len(path) == 1 or "/".join(path[:-1]) in found


def check_linen(model: Any) -> None:
    """Raises a UserError if a model is not a linen module."""
    if isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    if isinstance(model, nnx.Module) or (isinstance(model, type) and issubclass(model, nnx.Module)):
        raise UserError(f"{kind} is an NNX module, which is not supported yet: expected a flax.linen module")
    raise UserError(f"expected a flax.linen module, got {kind}")


def check_unboxed(params: Any) -> None:
    """Raises a UserError if parameters are in the boxes of `nn.with_partitioning`."""

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.meta.AxisMetadata)

    if any(map(is_box, jax.tree.leaves(params, is_leaf=is_box))):
        raise UserError("the parameters are in boxes, as of nn.with_partitioning: pass nn.unbox(params)")


def in_order(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, with the required ones by position however the caller passed them."""
    if not kwargs:
        return args, kwargs
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1 + len(args) :]
    rest = dict(kwargs)
    for parameter in parameters:
        needed = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        if not needed or parameter.name not in rest:
            break
        args = (*args, rest.pop(parameter.name))
    return args, rest


def _stack(path: str, seen: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The axes stacked before the parameters of a site or, if it has none, of the nearest enclosing module."""
    while path and not jax.tree.leaves(seen.get(path, {})):
        path = path.rpartition("/")[0]
    if not path:
        return ()
    own, whole = (jax.tree.leaves(tree) for tree in (seen[path], _subtree(params, path)))
    if len(own) != len(whole):
        return ()
    stacks = set()
    for a, b in zip(own, whole, strict=True):
        depth = len(b.shape) - len(a.shape)
        if b.shape[depth:] != a.shape:
            return None
        stacks.add(b.shape[:depth])
    return stacks.pop() if len(stacks) == 1 else None


def stack_axes(site: Site) -> tuple[int, ...]:
    """The axes on which a site's parameters are stacked; raises a UserError if these are not in front."""
    if site.stack is None:
        raise UserError(
            f"nn.scan or nn.vmap stacks the parameters of site {site.path!r} on an axis other than the first: pass "
            "variable_axes={'params': 0}"
        )
    return site.stack


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, tree)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def path_of(context: nn.module.InterceptorContext) -> str:
    """The path of the module whose `__call__` this is; "" for other methods and for the root."""
    module = context.module
    if context.method_name != "__call__" or module.scope is None:
        return ""
    return "/".join(module.path)


def site_of(path: str, module: nn.Module, args: tuple) -> Site:
    """The site at a path as known from the call: without its parameters and output."""
    return Site(path, layer_of(path), _kind(module), {}, _shapes(args))


def _kind(module: nn.Module) -> str:
    """The name of the class; for a DenseGeneral also why it is not a matrix product over its last axes."""
    name = type(module).__name__
    if isinstance(module, nn.DenseGeneral):
        axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
        if tuple(axes) != tuple(range(-len(axes), 0)) or module.batch_dims:
            return f"{name} over axes {tuple(axes)} with batch_dims {tuple(module.batch_dims)}"
    return name


def _subtree(tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for part in path.split("/"):
        tree = tree.get(part, {})
    return tree


def layer_of(path: str) -> int | None:
    """The layer number in a path: 3 for "encoder/layer_3/attention/query", None for "pooler"."""
    found = _LAYER.search(path)
    return int(found.group(1)) if found else None


def layers(sites: Sites) -> tuple[int, ...]:
    """The layer numbers of the sites, in ascending order.

    Raises:
      UserError: if the model has two numbered stacks of layers, such as an encoder's and a decoder's.
    """
    _one_stack(sites.values())
    return tuple(sorted({site.layer for site in sites.values() if site.layer is not None}))


def stack_of(path: str) -> str | None:
    """The part of a path before the layer number: "encoder/layer" for "encoder/layer_3/ffn", None for "pooler"."""
    found = _LAYER.search(path)
    return path[: found.start(1) - 1] if found else None


def within_layer(path: str) -> str:
    """The part of a path below its numbered layer: "ffn/output" for "encoder/layer_3/ffn/output"; all of "pooler"."""
    found = _LAYER.search(path)
    return path[found.end() :] if found else path


def _one_stack(sites: Iterable[Site]) -> None:
    stacks = sorted({stack for site in sites if (stack := stack_of(site.path)) is not None})
    if len(stacks) > 1:
        raise UserError(
            f"layers are numbered in {' and '.join(map(repr, stacks[:3]))}: name one of them in the pattern"
        )


def matches(pattern: str, path: str) -> bool:
    """Whether a path, or a suffix of whole parts, matches a regular expression.

    Raises:
      UserError: if it is not one, or repeats a group, as in "(a.*)*": that may take longer than anyone waits.
    """
    if _REPEATED_GROUP.search(_ESCAPED.sub("x", pattern)):
        raise UserError(f"pattern {pattern!r:.100} repeats a group, which may take for ever: write .* in its place")
    try:
        return re.fullmatch(rf"(?:.*/)?(?:{pattern})", path) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"pattern {pattern!r:.100} is not a regular expression: {error}") from None


def find(
    sites: Sites,
    pattern: str,
    layers: Iterable[int] | None = None,
    fits: Callable[[Site], bool] | None = None,
    wanted: str = "sites",
) -> tuple[Site, ...]:
    """The sites whose path, or the end of whose path, matches a regular expression.

    Args:
      sites: the sites of the model.
      pattern: matched against whole path parts from the end: "query", "query|value", "layer_[0-3]/attention/query".
        ".*" means every suitable site outside the head.
      layers: the layers to search; each must have a match. None means everywhere.
      fits: whether a site is suitable; None means all are.
      wanted: the name of suitable sites in error messages.

    Returns:
      The matches in the order of the forward pass, at least one.

    Raises:
      UserError: if nothing matches, overall or in one of the layers, or if a match is not suitable: the message lists
        the suitable sites of this model. A mistyped path is never silently a no-op. Also if a layer is not an integer,
        or a match is called "shared", "stacked" or "fixed" and lies at the top.
    """
    if not isinstance(pattern, str):
        raise UserError(f"a pattern is one string, such as 'query|value', got {pattern!r:.60}")
    hits = [site for path, site in sites.items() if matches(pattern, path)]
    suitable = [site for site in sites.values() if fits is None or fits(site)]
    if pattern == ALL:
        hits = [site for site in suitable if not site.head]
    if not hits:
        names = dict.fromkeys(site.path.rsplit("/", 1)[-1] for site in suitable)
        close = nearest(pattern.rsplit("/", 1)[-1], names)
        if fits is not None and not close.startswith("did you mean"):
            close = _described(suitable, wanted)
        raise UserError(f"pattern {pattern!r} matches no site of the model: {close}")
    for site in hits:
        if site.path in RESERVED:
            raise UserError(f"site {site.path!r} has a name that leaves need for themselves: rename it or leave it out")
        if fits is not None and not fits(site):
            raise UserError(f"{describe(site)} is not one of the {wanted}: {_described(suitable, wanted)}")
    if layers is None:
        return tuple(hits)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise UserError(f"layers must be a list of layer numbers, got {layers!r:.60}")
    given = tuple(layers)
    for layer in given:  # True is not layer 1, nor is 1.0
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise UserError(f"layers must be integers, got {layer!r:.60}")
    wanted_layers = set(given)
    if len(wanted_layers) < len(given):
        raise UserError(f"layers names a layer twice: {given}")
    if not wanted_layers:
        raise UserError("layers is empty: expected at least one layer, or None for all")
    for layer in sorted(wanted_layers - {site.layer for site in hits}):
        have = sorted({site.layer for site in hits if site.layer is not None})
        span = f"layers {have[0]}-{have[-1]} do" if have else "its matches are not in numbered layers"
        raise UserError(f"layer {layer} has no site that matches {pattern!r}: {span}")
    chosen = tuple(site for site in hits if site.layer in wanted_layers)
    _one_stack(chosen)
    return chosen


def describe(site: Site) -> str:
    """A site for an error message: its path, its kind, and its input and output shapes."""
    shapes = [
        ", ".join(str(list(x.shape)) for x in jax.tree.leaves(tree) if _is_array(x)) for tree in (site.args, site.out)
    ]
    return f"{site.path!r} ({site.kind}, {shapes[0]} to {shapes[1]})"


def _described(suitable: Sequence[Site], wanted: str) -> str:
    if not suitable:
        return f"this model has no {wanted}"
    listed = ", ".join(describe(site) for site in suitable[:5])
    return f"the {wanted} of this model are {listed}" + (", ..." if len(suitable) > 5 else "")
