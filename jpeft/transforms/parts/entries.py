"""Trains single entries of the base: shared code of FISH mask and its controls.

The leaves are the chosen entries themselves, {site path: {parameter: {"values": [k], "fixed": {"index": int32 [k]}}}},
where `index` refers to the flattened parameter. Inside the forward pass they are written into a copy of the parameter.
So the optimiser's state, weight decay, clipping and the saved file see only k entries, and all others stay
bit-identical. Nothing is added at inference: `merge` writes them into the base.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import wide
from jpeft.core.site import Sites
from jpeft.core.transform import FIXED, Leaves, Params, Transform
from jpeft.core.tree import at, replace
from jpeft.core.tree import count as num_entries
from jpeft.transforms.parts.linear import need_params
from jpeft.transforms.parts.places import find_with_params, own_parameters

__all__ = ["Budget", "Chosen", "budget_of", "candidates_of", "masked", "take"]

Chosen = Mapping[tuple[str, str], Any]  # by (site path, parameter name)
Budget = Callable[[Params, Sites, Chosen], int]


def take(values: Chosen, indices: Mapping[tuple[str, str], np.ndarray]) -> Leaves:
    """The leaves with the entries of `values` at flat `indices`; none for parameters without entries."""
    leaves: Leaves = {}
    for (path, name), index in indices.items():
        if index.size:
            # In NumPy: JAX would compile a program for every shape.
            entries = jnp.asarray(np.asarray(values[path, name]).reshape(-1)[index])
            leaves.setdefault(path, {})[name] = {"values": wide(entries), FIXED: {"index": jnp.asarray(index)}}
    return leaves


def masked(name: str, budget: Budget, targets: str, draw: Callable[[Array, Any, int], Any]) -> Transform:
    """The transform that trains the entries selected by `draw(key, candidates, number of entries)`."""

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        params = need_params(params, name)
        candidates = candidates_of(params, sites, targets)
        return take(candidates, draw(key, candidates, budget(params, sites, candidates)))

    def merge(leaves: Leaves, params: Params) -> Params:
        where = {(path, parameter): leaf for path, own in leaves.items() for parameter, leaf in own.items()}
        written = _write({(path, name): at(params, f"{path}/{name}") for path, name in where}, where)
        for (path, parameter), w in written.items():
            params = replace(params, f"{path}/{parameter}", lambda _, w=w: w)
        return params

    def decay(path: tuple[str, ...], leaf: Any) -> bool:
        del leaf  # always one-dimensional: entries decay as the whole parameter would
        return path[1] not in ("bias", "scale")

    return Transform(name, init, None, merge, decay=decay)


@jax.jit  # one program for all parameters, where op by op it would be several for every shape
def _write(params: Chosen, leaves: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Array]:
    """The parameters with the entries of their leaves in their places."""

    def one(w: Array, leaf: Mapping[str, Any]) -> Array:
        values = leaf["values"].astype(w.dtype)
        flat = w.reshape(-1).at[leaf[FIXED]["index"]].set(values, indices_are_sorted=True, unique_indices=True)
        return flat.reshape(w.shape)

    return {where: one(params[where], leaf) for where, leaf in leaves.items()}


def candidates_of(params: Params, sites: Sites, targets: str) -> dict[tuple[str, str], Any]:
    """The parameters whose entries can be chosen, by site path and name."""
    where = find_with_params(sites, targets)
    return {(site.path, name): at(params, f"{site.path}/{name}") for site in where for name in own_parameters(site)}


def budget_of(ratio: float, count: int | None, head_counts: bool) -> Budget:
    """A function from all parameters, sites and candidates to the number of candidates that train."""
    if count is not None:
        if count < 0:
            raise UserError(f"count must be at least 0, got {count}")
    elif not 0 < ratio <= 1:
        raise UserError(f"ratio must be above 0 and at most 1, got {ratio}")

    def budget(params: Params, sites: Sites, candidates: Chosen) -> int:
        total, available = num_entries(params), sum(int(np.prod(x.shape)) for x in candidates.values())
        names = {path.split("/")[0] for path, site in sites.items() if site.head} if head_counts else ()
        head = sum(num_entries(params.get(name, {})) for name in names)
        wanted = int(ratio * total) if count is None else count
        said = f"count {count:,}" if count is not None else f"ratio {ratio} of {total:,} parameters is {wanted:,}"
        if wanted < head:
            raise UserError(f"{said}: less than the head's {head:,}, which always trains: increase it")
        if count is not None and wanted - head > available:
            raise UserError(f"{said}: more than the {available + head:,} that can train: lower it")
        return min(wanted - head, available)

    return budget
