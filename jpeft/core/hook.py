"""The hook: one `nn.intercept_methods` that runs a transform where the forward pass reaches its sites.

The leaves of a site are put in the "params" collection, next to the site's own parameters, so they go wherever those
go: `nn.scan`, `nn.vmap` and `nn.RNN` pass on the collections they are given, and "params" is always one of them.

A module with a quantised kernel is called with a dense one in its place, be there leaves at its site or not.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import subtract_filters
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.quantised import dense, holds_quantised, is_quantised, remade
from jpeft.core.site import check_linen, check_unboxed, in_order, path_of, site_of, sites
from jpeft.core.transform import SHARED, STACKED, Call, Chain, Context, Params, Transform, checked, typed

__all__ = ["apply"]

_HELD = "__peft__"  # the name under which the hook stores its data among a site's parameters


class _Held:
    """The data stored next to a site's parameters: its own pytree type, so that nothing traverses it by mistake.

    Attributes:
      members: the transforms at this site by instance, in the order of the chain.
      path: of the site. Both are static, hence part of the cache key of `nn.jit`: what a wrap does may depend on where.
      leaves: {instance: (own leaves, shared leaves)}.
      ambient: {"key": ..., "mask": ...}, each only if given.
      stack: zeros of shape (*stack, 0); shape (0,) inside the scans and maps that stack the site's parameters.
    """

    def __init__(self, members: tuple[tuple[str, Transform], ...], path: str, leaves: Any, ambient: Any, stack: Any):
        self.members, self.path, self.leaves, self.ambient, self.stack = members, path, leaves, ambient, stack


jax.tree_util.register_pytree_node(
    _Held,
    lambda held: ((held.leaves, held.ambient, held.stack), (held.members, held.path)),
    lambda static, x: _Held(*static, *x),
)


def apply(
    model: nn.Module,
    transform: Transform | Chain,
    variables: Mapping[str, Any],
    *args: Any,
    mask: Array | None = None,
    rngs: dict[str, Array] | Array | None = None,
    **kwargs: Any,
) -> Any:
    """`model.apply` with a transform around its sites.

    Inside `nn.scan` and `nn.vmap` with stacked parameters, each copy of a site has its own leaves and dropout key.
    Where the copies share their parameters, as the steps of `nn.RNN` do, they also share leaves and key.

    Args:
      model: any linen module.
      transform: a method or a chain.
      variables: as for `model.apply`, with the leaves under "peft". Kernels may be quantised (`jpeft.quantise`); wraps
        see them dense.
      *args: positional arguments of the model's `__call__`.
      mask: passed to the wraps as `ctx.mask`; for our encoders, the attention mask. A model that has an argument of
        this name gets it, too.
      rngs: as for `model.apply`: keys by name, or one key for all. With a "dropout" key, or one for all, the wraps
        are in training mode and use it.
      **kwargs: keyword arguments of the model's `__call__`, and `mutable` or `method` as for `model.apply`.

    Returns:
      The output of `model.apply`.

    Raises:
      UserError: if the model is not a linen module, the leaves do not belong to this transform, or they are for sites
        that the model does not have or that they cannot reach.
    """
    check_linen(model)
    variables = dict(variables)
    leaves = variables.pop("peft", {})
    named = checked(transform, leaves)
    placed: dict[str, dict[str, Any]] = {}
    given = variables.get("params", {})
    check_unboxed(given)
    for name, member in named.items():
        if member.wrap is None and member.merge is not None:
            variables["params"] = typed(member.merge(leaves[name], variables["params"]), variables["params"])
            continue
        shared = leaves[name].get(SHARED, {})
        for path, own in leaves[name].items():
            if path != SHARED:
                placed.setdefault(path, {})[name] = (own, shared)
    key = rngs.get("dropout") if isinstance(rngs, dict) else rngs
    params = merged = variables.get("params", {})
    for path, at_site in placed.items():
        params = _insert(params, path.split("/"), _held(path, at_site, named, key, mask))
    variables["params"] = params
    reached: set[str] = set()
    missed: set[str] = set()
    active: set[str] = set()
    quantised = holds_quantised(params)

    def hook(call: Call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path, module = path_of(context), context.module
        if quantised and path:
            call = _dequantised(module, call)
        # Within its own call, a path is that of `super().__call__`, or of a module that shares its scope.
        if path not in placed or path in active:
            return call(*args, **kwargs)
        # A wrap may run its own module with `.apply`: nothing is stored in that scope, so it is left alone.
        if not module.has_variable("params", _HELD):
            missed.add(path)
            return call(*args, **kwargs)
        reached.add(path)
        held: _Held = module.get_variable("params", _HELD)
        if held.stack.shape != (0,):
            raise UserError(f"the leaves at site {path!r} are stacked, but its parameters are not: use the model's own")
        own_params = dense(_without_held(module.variables.get("params", {})))
        args, kwargs = in_order(module, args, kwargs)
        site = site_of(path, module, args)._replace(params=own_params)
        ambient = held.ambient
        ctx = Context("key" in ambient, ambient.get("key"), ambient.get("mask"), own_params, {}, model)

        def inner(*a: Any) -> Any:
            return call(*a, **kwargs)

        for name, member in held.members:
            own, shared = held.leaves[name]
            inner = _wrapped(member, own, site, inner, ctx._replace(shared=shared))
        active.add(path)
        try:
            return inner(*args)
        finally:
            active.remove(path)

    if mask is not None and _lacks_mask(model, args, kwargs):
        kwargs["mask"] = mask
    with nn.intercept_methods(hook):
        out = model.apply(variables, *args, rngs=rngs, **kwargs)
    for path in sorted(missed - reached):
        raise UserError(
            f"a lift such as nn.scan or nn.vmap does not pass the leaves to site {path!r}: pass it "
            "variable_axes={'params': 0} or, where the copies share parameters, variable_broadcast='params'"
        )
    _check_reached(set(placed) - reached, model, variables["params"], args, kwargs)
    if kwargs.get("mutable", False) is False or "params" not in out[1]:
        return out
    return out[0], {**out[1], "params": _without_edits(_without_held(out[1]["params"]), merged, given)}


def _lacks_mask(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the method that is called has an argument `mask` that was not given."""
    method = kwargs.get("method") or "__call__"
    # A bound method has lost its first argument.
    called = getattr(type(model), method, None) if isinstance(method, str) else getattr(method, "__func__", method)
    if called is None:
        return False  # for flax to say
    _, *names = inspect.signature(called).parameters
    return "mask" in names and "mask" not in names[: len(args)]


def _dequantised(module: nn.Module, call: Call) -> Call:
    """The call of a module, with dense kernels in the place of its own quantised ones."""
    params = _without_held(module.variables.get("params", {}))
    own = {name: x for name, x in params.items() if is_quantised(x)}
    if not own:
        return call
    bare = module.clone(parent=None)  # whose parameters can be given; the hook leaves it alone
    rest = {**module.variables, "params": {name: x for name, x in params.items() if name not in own}}
    keys, changes = {}, False
    if not type(module).__module__.startswith("flax.linen"):  # whose layers with kernels draw and keep nothing
        assert module.scope is not None
        keys = {name: module.make_rng(name) for name in module.scope.rngs}
        changes = subtract_filters(module.scope.mutable, "params") or False

    def run(own: Params, rest: Any, keys: Any, args: tuple, kwargs: dict) -> Any:
        given = {**rest, "params": {**rest["params"], **dense(own)}}
        out = bare.apply(given, *args, rngs=keys, mutable=changes, **kwargs)
        if changes is False:
            return out
        out, kept = out
        if jax.tree.leaves(kept):
            raise UserError(
                f"{'/'.join(module.path)} keeps {', '.join(sorted(kept))}, which a quantised layer cannot hand on: "
                "leave it out of what is quantised, or of `mutable`"
            )
        return out

    return lambda *args, **kwargs: remade(run, own, rest, keys, args, kwargs)


def _held(path: str, at_site: Mapping[str, Any], named: Mapping[str, Transform], key: Any, mask: Any) -> _Held:
    """The data to store next to the parameters of one site."""
    stack: tuple[int, ...] = ()
    leaves: dict[str, Any] = {}
    for name, (own, shared) in at_site.items():
        depth = 0
        while STACKED in own:
            own, depth = own[STACKED], depth + 1
        found = {np.shape(x)[:depth] for x in jax.tree.leaves(own)}
        if len(found) > 1 or (stack and found and found != {stack}):
            raise UserError(f"the leaves at site {path!r} are stacked unevenly: {sorted(found | {stack})}")
        stack = found.pop() if found else stack
        leaves[name] = (own, shared)
    ambient = {name: x for name, x in (("key", key), ("mask", mask)) if x is not None}
    if stack:

        def copied(x: Any) -> Array:
            return jnp.broadcast_to(x, (*stack, *np.shape(x)))

        leaves = {name: (own, jax.tree.map(copied, shared)) for name, (own, shared) in leaves.items()}
        if mask is not None:
            ambient["mask"] = copied(mask)
        if key is not None:
            ambient["key"] = jax.random.split(key, stack)
    members = tuple((name, member) for name, member in named.items() if name in leaves)
    return _Held(members, path, leaves, ambient, jnp.zeros((*stack, 0)))


def _wrapped(member: Transform, own: Any, site: Any, inner: Call, ctx: Context) -> Call:
    assert member.wrap is not None
    wrap = member.wrap
    return lambda *args: wrap(own, site, inner, args, ctx)


def _insert(params: Params, parts: list[str], held: _Held) -> dict[str, Any]:
    """The parameters with `held` inserted at a path; modules without parameters get an entry."""
    if not parts:
        return {**params, _HELD: held}
    return {**params, parts[0]: _insert(params.get(parts[0], {}), parts[1:], held)}


def _without_held(params: Any) -> Any:
    if not isinstance(params, Mapping):
        return params
    return {name: _without_held(x) for name, x in params.items() if name != _HELD}


def _without_edits(params: Any, merged: Any, given: Any) -> Any:
    """The parameters with those that a method had changed as they were given."""
    if merged is given:
        return params
    if isinstance(params, Mapping) and isinstance(given, Mapping):
        both = {name: (merged[name], given[name]) for name in given}
        return {name: _without_edits(x, *both[name]) if name in both else x for name, x in params.items()}
    return given


def _check_reached(unreached: set[str], model: nn.Module, params: Params, args: tuple, kwargs: dict) -> None:
    # Under `nn.jit` a cached trace does not call the hook again, so an unreached site is not always an error.
    if not unreached:
        return
    call = {name: x for name, x in kwargs.items() if name != "mutable"}
    have = _paths(model, args, call)
    for path in sorted(unreached - have):
        # This call may take another path than the one that listed the sites, as without a head for training alone.
        # Of another method, it is enough that the site lies in a module of the model.
        parent = path.rpartition("/")[0] or path
        if _has(params, path) or ("method" in call and _has(params, parent)):
            continue
        raise UserError(f"there are leaves for site {path!r}, which the model does not have: {nearest(path, have)}")


def _has(params: Params, path: str) -> bool:
    for part in path.split("/"):
        if part not in params:
            return False
        params = params[part]
    return bool(set(params) - {_HELD})


def _paths(model: nn.Module, args: tuple, kwargs: dict) -> frozenset[str]:
    """The paths of the model's sites, cached by model and argument shapes."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, (args, kwargs)
    )
    leaves, treedef = jax.tree.flatten(shapes)
    try:
        return _listed(model, tuple(leaves), treedef)
    except TypeError:  # an unhashable model or argument
        return _listed.__wrapped__(model, tuple(leaves), treedef)


@functools.lru_cache(maxsize=64)
def _listed(model: nn.Module, leaves: tuple, treedef: Any) -> frozenset[str]:
    args, kwargs = jax.tree.unflatten(treedef, leaves)
    return frozenset(sites(model, *args, **kwargs))
