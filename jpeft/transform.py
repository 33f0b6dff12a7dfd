"""The core: a method is a NamedTuple of pure functions, and a hook runs it where the forward pass reaches its sites.

The base model is never edited. Its `params` stay bit-identical; a method keeps its own small pytree beside them, keyed
by instance and then by site, with a place for what several sites share:

    variables = {
        "params": {...},                                                  # frozen, as loaded
        "peft": {
            "prefix_0": {"shared": {...}, "encoder/layer_0/attention/core": {...}},
            "lora_0": {"encoder/layer_1/attention/query": {"a": [in, r], "b": [r, out]}, ...},
        },
    }

From there to a forward pass is one call, `apply(model, transform, variables, *args)`. It places every site's leaves, by
reference, in the linen variable collection "peft" at that site, enters `nn.intercept_methods` and calls `model.apply`.
Leaves that were captured by a closure instead would be silently wrong under `nn.jit`, whose cache key ignores
interceptors; as variables they are right under jit, grad, vmap, remat and scan.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array

from jpeft.errors import UserError, nearest

__all__ = [
    "SHARED",
    "Chain",
    "Context",
    "Merged",
    "Site",
    "Sites",
    "Transform",
    "apply",
    "chain",
    "find",
    "fold",
    "init",
    "init_sites",
    "instances",
    "layer_of",
    "layers",
    "merge",
    "site_key",
    "sites",
]

SHARED = "shared"  # the key, beside the sites of an instance, of the leaves that all its sites read
_LEAVES, _CONTEXT = "peft", "peft_context"  # the variable collections that the hook reads
_LAYER = re.compile(r"(?:^|/)(?:layers?|blocks?|h)_(\d+)(?:/|$)")

Params = Mapping[str, Any]
Leaves = dict[str, Any]


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
    params: Params
    args: tuple[Any, ...]


Sites = dict[str, Site]


class Context(NamedTuple):
    """What a wrap may need besides its own leaves and the call's arguments.

    Attributes:
      train: whether this is a training pass, that is, whether `apply` was given a dropout key.
      key: the dropout key of this pass, the same at every site: use it as it is for one draw per step, `site_key` for
        one per site. None unless `train`.
      mask: the `mask` given to `apply`, such as [b, t] segment numbers with 0 for padding; None if none was given.
      params: the site's own frozen parameters.
      shared: the leaves that this instance's sites share; {} if there are none.
    """

    train: bool
    key: Array | None
    mask: Array | None
    params: Params
    shared: Params


Call = Callable[..., Any]


class Transform(NamedTuple):
    """A method: what it adds to a model, and what happens when the forward pass reaches a site that has leaves.

    Attributes:
      name: the method's name; it names the instance in the leaves.
      init: (key, sites, params) -> {site path: leaves, "shared": leaves}.
      wrap: (leaves, site, call, args, ctx) -> out. `call(*args)` runs what it wraps: the site, or the member of a chain
        that was written before. None means that the leaves are merged into the parameters inside the forward pass.
      merge: (leaves, params) -> params with the method folded into the base weights, a new pytree. None if impossible.
      fold: (leaves) -> leaves without what only training needs. None if there is nothing of the kind.
    """

    name: str
    init: Callable[[Array, Sites, Params | None], Leaves]
    wrap: Callable[[Any, Site, Call, tuple[Any, ...], Context], Any] | None
    merge: Callable[[Leaves, Params], Params] | None = None
    fold: Callable[[Leaves], Leaves] | None = None


class Chain(NamedTuple):
    """Transforms in the order in which they act; made by `chain`."""

    members: tuple[Transform, ...]


class Merged(NamedTuple):
    """The result of `merge`: new parameters, and what could not be merged with its leaves."""

    params: Params
    transform: Chain
    leaves: Leaves


def chain(*transforms: Transform | Chain) -> Chain:
    """Composes transforms in the order written: where two meet at a site, the later one wraps the earlier one."""
    return Chain(tuple(t for each in transforms for t in _members(each)))


def _members(transform: Transform | Chain) -> tuple[Transform, ...]:
    return transform.members if isinstance(transform, Chain) else (transform,)


def instances(transform: Transform | Chain) -> dict[str, Transform]:
    """The members by instance name: the method's name and a count, "lora_0", "prefix_0", "lora_1"."""
    named: dict[str, Transform] = {}
    for member in _members(transform):
        count = sum(other.name == member.name for other in named.values())
        named[f"{member.name}_{count}"] = member
    return named


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

    def spy(call: Call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = _path(context)
        if path and path not in found:
            found[path] = _site(path, context.module, args)
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


def _path(context: nn.module.InterceptorContext) -> str:
    """The path of the module whose `__call__` this is; "" for other methods and for the root."""
    module = context.module
    if context.method_name != "__call__" or module.scope is None:
        return ""
    return "/".join(module.path)


def _site(path: str, module: nn.Module, args: tuple) -> Site:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, args)
    return Site(path, layer_of(path), type(module).__name__, {}, shapes)


def _subtree(tree: Params, path: str) -> Params:
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
    try:
        regex = re.compile(rf"(?:.*/)?(?:{pattern})")
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    hits = [site for path, site in sites.items() if regex.fullmatch(path)]
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


def site_key(key: Array, path: str) -> Array:
    """A key for one site: it depends on the path alone, so that leaving a layer out changes no other layer's draw."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init_sites(key: Array, where: Sequence[Site], make: Callable[[Array, Site], Any]) -> Leaves:
    """Makes leaves for each site: {path: make(site_key(key, path), site)}."""
    return {site.path: make(site_key(key, site.path), site) for site in where}


def init(transform: Transform | Chain, key: Array, sites: Sites, params: Params | None = None) -> Leaves:
    """Makes the leaves of a transform.

    Args:
      transform: a method or a chain.
      key: a PRNG key; each instance and site folds its name in, so what else is in the chain does not matter.
      sites: the sites of the model, from `sites`.
      params: the model's frozen parameters, for methods that start from them.

    Returns:
      {instance: {site path: leaves, "shared": leaves}}.

    Raises:
      UserError: if a method finds no place for itself.
    """
    named = instances(transform)
    return {name: member.init(site_key(key, name), sites, params) for name, member in named.items()}


def apply(
    model: nn.Module,
    transform: Transform | Chain,
    variables: Mapping[str, Any],
    *args: Any,
    mask: Array | None = None,
    rngs: dict[str, Array] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.apply` with a transform around its sites.

    Args:
      model: any linen module.
      transform: a method or a chain.
      variables: as for `model.apply`, with the leaves under "peft".
      *args: what the model's `__call__` takes.
      mask: handed to the wraps as `ctx.mask`; for our encoders, the attention mask.
      rngs: as for `model.apply`. With a "dropout" key the wraps are in training mode and draw from it.
      **kwargs: what the model's `__call__` takes, and `mutable` or `method`, as for `model.apply`.

    Returns:
      What `model.apply` returns.

    Raises:
      UserError: if the leaves are not this transform's, or are at places that the model does not have.
    """
    variables = dict(variables)
    leaves = variables.pop("peft", {})
    members = instances(transform)
    if set(leaves) != set(members):
        raise UserError(f"leaves of {sorted(leaves)} do not fit a transform with {sorted(members)}")
    key = None if rngs is None else rngs.get("dropout")
    placed: dict[str, dict[str, Any]] = {}
    for name, member in members.items():
        if member.wrap is None and member.merge is not None:
            variables["params"] = member.merge(leaves[name], variables["params"])
            continue
        shared = leaves[name].get(SHARED, {})
        for path, own in leaves[name].items():
            if path != SHARED:
                placed.setdefault(path, {})[name] = {"own": own, "shared": shared}
    ambient: dict[str, Any] = {name: x for name, x in (("key", key), ("mask", mask)) if x is not None}
    ambient["members"] = _Members(members.values())
    reached: set[str] = set()

    def hook(call: Call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        # A wrap may run a module of its own with `.apply`: its scope has no leaves, so it is left alone.
        path, module = _path(context), context.module
        if path not in placed or not module.has_variable(_LEAVES, "leaves"):
            return call(*args, **kwargs)
        reached.add(path)
        here, around = module.get_variable(_LEAVES, "leaves"), module.get_variable(_CONTEXT, "ambient")
        own_params = module.variables.get("params", {})
        site = _site(path, module, args)._replace(params=own_params)
        ctx = Context("key" in around, around.get("key"), around.get("mask"), own_params, {})

        def inner(*a: Any) -> Any:
            return call(*a, **kwargs)

        for name, member in members.items():  # not `here`: a traced dict comes back sorted by key
            if name in here:
                held = here[name]
                inner = _wrapped(member, held["own"], site, inner, ctx._replace(shared=held["shared"]))
        return inner(*args)

    with nn.intercept_methods(hook):
        out = model.apply(
            {
                **variables,
                _LEAVES: _place(placed, "leaves"),
                _CONTEXT: _place(dict.fromkeys(placed, ambient), "ambient"),
            },
            *args,
            rngs=rngs,
            **kwargs,
        )
    _check_reached(set(placed) - reached, model, args, kwargs)
    return out


@jax.tree_util.register_static
class _Members(tuple):
    """The members of a chain as a pytree without leaves: in the variables, they enter the cache key of `nn.jit`."""

    __slots__ = ()


def _wrapped(member: Transform, own: Any, site: Site, inner: Call, ctx: Context) -> Call:
    assert member.wrap is not None
    wrap = member.wrap
    return lambda *args: wrap(own, site, inner, args, ctx)


def _place(by_path: Mapping[str, Any], name: str) -> dict[str, Any]:
    """{"a/b": x} to the nested {"a": {"b": {name: x}}} that linen scopes read."""
    tree: dict[str, Any] = {}
    for path, value in by_path.items():
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def _check_reached(unreached: set[str], model: nn.Module, args: tuple, kwargs: dict) -> None:
    # Under `nn.jit` a cached trace does not call the hook again, so a site that was not reached is only suspicious.
    if not unreached:
        return
    kwargs = {name: value for name, value in kwargs.items() if name not in ("mutable", "method")}
    have = sites(model, *args, **kwargs)
    for path in sorted(unreached - set(have)):
        raise UserError(f"the model has no site {path!r} that the leaves are for: {nearest(path, have)}")


def merge(transform: Transform | Chain, leaves: Leaves, params: Params) -> Merged:
    """Folds into the base weights what can be folded. The base is not touched, so unmerging is keeping the old tree.

    Args:
      transform: a method or a chain.
      leaves: its leaves.
      params: the base parameters.

    Returns:
      New parameters, the chain of the members that cannot be merged, and their leaves.
    """
    rest: list[Transform] = []
    rest_leaves: list[Any] = []
    for name, member in instances(transform).items():
        if member.merge is None:
            rest.append(member)
            rest_leaves.append(leaves[name])
        else:
            params = member.merge(leaves[name], params)
    left = Chain(tuple(rest))
    return Merged(params, left, dict(zip(instances(left), rest_leaves, strict=True)))


def fold(transform: Transform | Chain, leaves: Leaves) -> Leaves:
    """Drops what only training needs, such as the MLP of a prefix; the transform stays and reads the smaller leaves."""
    folded = {name: member.fold for name, member in instances(transform).items()}
    return {name: leaves[name] if fn is None else fn(leaves[name]) for name, fn in folded.items()}
