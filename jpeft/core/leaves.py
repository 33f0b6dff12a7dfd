"""Creates, merges and folds leaves site by site, for the `init`, `merge` and `fold` of transforms.

Where `nn.scan` or `nn.vmap` stacks a site's parameters, functions written for one copy are mapped over all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core import tree
from jpeft.core.site import Site, stack_axes
from jpeft.core.transform import SHARED, STACKED, Leaves, Params, site_key

__all__ = ["fold_sites", "init_sites", "merge_sites", "wide"]


def init_sites(key: Array, where: Sequence[Site], make: Callable[..., Any], params: Params | None = None) -> Leaves:
    """Creates leaves for each site: {path: make(site_key(key, path), site)}.

    At a site with stacked parameters, `make` is mapped over one key per copy, so its leaves are stacked as well.

    Args:
      key: a PRNG key.
      where: the sites.
      make: (key, site) -> leaves; or (key, site, own parameters), at least float32, if `params` are given.
      params: the model's parameters.

    Raises:
      UserError: if a site is stacked in a way that is not supported.
    """

    def at_site(site: Site) -> Any:
        stack = stack_axes(site)
        own = () if params is None else (wide(tree.at(params, site.path)),)

        def one(key: Array, *own: Any) -> Any:
            return make(key, site, *own)

        build, keys = one, site_key(key, site.path)
        for _ in stack:
            build = _stacked(build)
        return build(jax.random.split(keys, stack) if stack else keys, *own)

    return {site.path: at_site(site) for site in where}


def merge_sites(leaves: Leaves, params: Params, fn: Callable[[str, Any, Any], Any]) -> Params:
    """The parameters with those of every site replaced by fn(path, leaves, its own parameters).

    Computed in at least float32 and returned in the dtypes of the parameters.
    """

    def merged(path: str, own: Any, old: Any) -> Any:
        def one(own: Any, old: Any) -> Any:
            return jax.vmap(one)(own[STACKED], old) if STACKED in own else fn(path, own, old)

        return jax.tree.map(lambda new, x: new.astype(x.dtype), one(own, wide(old)), old)

    for path, own in leaves.items():
        if path != SHARED:
            params = tree.replace(params, path, lambda old, path=path, own=own: merged(path, own, dict(old)))
    return params


def fold_sites(leaves: Leaves, fn: Callable[[Any], Any]) -> Leaves:
    """{path: fn(leaves)} for every site. Shared leaves are left out."""

    def one(own: Any) -> Any:
        return {STACKED: jax.vmap(one)(own[STACKED])} if STACKED in own else fn(own)

    return {path: one(own) for path, own in leaves.items() if path != SHARED}


def wide(params: Any) -> Any:
    """Casts half-precision floats to float32: what depends on weights is computed in at least that."""
    return jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        params,
    )


def _stacked(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: {STACKED: jax.vmap(fn)(*args)}
