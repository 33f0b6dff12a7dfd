"""The hook: one `nn.intercept_methods` that runs a transform where the forward pass reaches its sites."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.site import Site, path_of, site_of, sites
from jpeft.transform import SHARED, Call, Chain, Context, Transform, instances

__all__ = ["apply"]

_LEAVES, _CONTEXT = "peft", "peft_context"  # the variable collections that the hook reads


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
    named = instances(transform)
    if set(leaves) != set(named):
        raise UserError(f"leaves of {sorted(leaves)} do not fit a transform with {sorted(named)}")
    key = None if rngs is None else rngs.get("dropout")
    placed: dict[str, dict[str, Any]] = {}
    for name, member in named.items():
        if member.wrap is None and member.merge is not None:
            variables["params"] = member.merge(leaves[name], variables["params"])
            continue
        shared = leaves[name].get(SHARED, {})
        for path, own in leaves[name].items():
            if path != SHARED:
                placed.setdefault(path, {})[name] = {"own": own, "shared": shared}
    ambient: dict[str, Any] = {name: x for name, x in (("key", key), ("mask", mask)) if x is not None}
    ambient["members"] = _Members(named.values())
    reached: set[str] = set()

    def hook(call: Call, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        # A wrap may run a module of its own with `.apply`: its scope has no leaves, so it is left alone.
        path, module = path_of(context), context.module
        if path not in placed or not module.has_variable(_LEAVES, "leaves"):
            return call(*args, **kwargs)
        reached.add(path)
        here, around = module.get_variable(_LEAVES, "leaves"), module.get_variable(_CONTEXT, "ambient")
        own_params = module.variables.get("params", {})
        site = site_of(path, module, args)._replace(params=own_params)
        ctx = Context("key" in around, around.get("key"), around.get("mask"), own_params, {})

        def inner(*a: Any) -> Any:
            return call(*a, **kwargs)

        for name, member in named.items():  # not `here`: a traced dict comes back sorted by key
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
