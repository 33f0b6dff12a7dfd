"""Training single entries of the base: FISH mask, and masks of the same size at random or by magnitude as its controls.

The leaves are the chosen entries themselves, {site path: {parameter: {"values": [k], "fixed": {"index": int32 [k]}}}},
where `index` counts through the flattened parameter. Inside the forward pass they are written over a copy of the
parameter; so the optimiser's state, weight decay, clipping and the saved file see k entries and nothing else, and what
was not chosen stays bit-identical. Nothing is added at inference: `merge` writes them for good.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.fisher import LABELS, VALUES
from jpeft.selection import sparse
from jpeft.selection.existing import BODY, own_parameters
from jpeft.site import Sites, find
from jpeft.transform import FIXED, Leaves, Params, Setting, Transform
from jpeft.transforms.linear import sizes
from jpeft.tree import at, flatten, replace, unflatten, union
from jpeft.tree import count as num_entries

__all__ = ["fish", "magnitude_mask", "random_mask", "take"]

Chosen = Mapping[tuple[str, str], Any]  # by (site path, parameter name)
Budget = Callable[[Params, Chosen], int]


def fish(
    ratio: float = 0.005,
    count: int | None = None,
    num_examples: int = 1024,
    labels: str = "empirical",
    values: str = "square",
    head_counts: bool = True,
    targets: str = BODY,
) -> Transform:
    """FISH mask: trains the entries with the largest Fisher information (Sung et al. 2021, arXiv:2111.09839).

    The budget is int(ratio * all parameters of the model), or `count`. The head always trains and is part of it, as in
    the reference (varunnair18/FISH); the rest goes to the entries whose Fisher information is largest, over all targets
    together. `init` draws entries at random; `prepare` chooses them by data.

    Args:
      ratio: trained share of all parameters.
      count: the number of trained entries, in place of `ratio`.
      num_examples: how many training examples the information is averaged over.
      labels: "empirical" takes the true label of each example, "expected" all labels as probable as the model holds
        them, "sampled" one drawn from the model.
      values: "square" or "absolute" values of the gradients.
      head_counts: whether the head is part of the budget; otherwise it trains on top of it.
      targets: pattern of the sites whose entries can be chosen, see `jpeft.find`.

    Returns:
      A transform with leaves as above.

    Raises:
      UserError: if an option is out of range; in `init`, if the budget does not even hold the head, or is larger than
        all there is.
    """
    sizes(num_examples=num_examples)
    for name, value, known in (("labels", labels, LABELS), ("values", values, VALUES)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown: {nearest(value, known)}")
    budget = _budget(ratio, count, head_counts)

    def prepare(setting: Setting) -> Leaves:
        params = setting.variables["params"]
        candidates = _candidates(params, setting.sites, targets)
        part = unflatten({(*path.split("/"), name): x for (path, name), x in candidates.items()})
        # Without its own leaves, which would stand in the place of the entries that were drawn at first.
        rest = {"params": params, "peft": {**setting.variables["peft"], setting.instance: {}}}
        of = setting.loss if labels == "empirical" else setting.logits

        def value(part: Params, example: Any, rest: Params) -> Array:
            return of(union(rest, {"params": part}), example)

        scores = flatten(setting.fisher(value, part, num_examples, rest, labels=labels, values=values))
        by_site = {(path, name): scores[(*path.split("/"), name)] for path, name in candidates}
        return take(candidates, sparse.top(by_site, budget(params, candidates)))

    return _masked("fish", budget, targets, sparse.random)._replace(prepare=prepare)


def random_mask(
    ratio: float = 0.005, count: int | None = None, head_counts: bool = True, targets: str = BODY
) -> Transform:
    """Trains entries drawn at random, as many as FISH mask does: the control of Sung et al. 2021, arXiv:2111.09839.

    Args:
      ratio: as for `fish`, and so are the others.
      count: as for `fish`.
      head_counts: as for `fish`.
      targets: as for `fish`.

    Returns:
      A transform with leaves as above.

    Raises:
      UserError: as `fish`.
    """
    return _masked("random_mask", _budget(ratio, count, head_counts), targets, sparse.random)


def magnitude_mask(
    ratio: float = 0.005, count: int | None = None, head_counts: bool = True, targets: str = BODY
) -> Transform:
    """Trains the entries that are largest in absolute value, as many as FISH mask does: a control that needs no data.

    The criterion is that of pruning by magnitude (Han et al. 2015, arXiv:1506.02626).

    Args:
      ratio: as for `fish`, and so are the others.
      count: as for `fish`.
      head_counts: as for `fish`.
      targets: as for `fish`.

    Returns:
      A transform with leaves as above.

    Raises:
      UserError: as `fish`.
    """
    budget = _budget(ratio, count, head_counts)
    return _masked("magnitude_mask", budget, targets, lambda key, values, k: sparse.magnitude(values, k))


def take(values: Chosen, indices: Mapping[tuple[str, str], np.ndarray]) -> Leaves:
    """The leaves that hold the entries of `values` at flat `indices`; nothing for parameters without any."""
    leaves: Leaves = {}
    for (path, name), index in indices.items():
        if index.size:
            entries = jnp.asarray(values[path, name]).reshape(-1)[index]
            leaves.setdefault(path, {})[name] = {"values": entries, FIXED: {"index": jnp.asarray(index)}}
    return leaves


def _masked(name: str, budget: Budget, targets: str, draw: Callable[[Array, Any, int], Any]) -> Transform:
    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        if params is None:
            raise UserError(f"{name} starts from the model's parameters: give `params` to init")
        candidates = _candidates(params, sites, targets)
        return take(candidates, draw(key, candidates, budget(params, candidates)))

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            for parameter, leaf in own.items():
                params = replace(params, f"{path}/{parameter}", lambda w, leaf=leaf: _write(w, leaf))
        return params

    return Transform(name, init, None, merge)


def _write(w: Array, leaf: Mapping[str, Any]) -> Array:
    flat = w.reshape(-1).at[leaf[FIXED]["index"]].set(leaf["values"], indices_are_sorted=True, unique_indices=True)
    return flat.reshape(w.shape)


def _candidates(params: Params, sites: Sites, targets: str) -> dict[tuple[str, str], Any]:
    where = find(sites, targets)
    return {(site.path, name): at(params, site.path)[name] for site in where for name in own_parameters(site)}


def _budget(ratio: float, count: int | None, head_counts: bool) -> Budget:
    """The function from all parameters and the candidates to how many of the candidates train."""
    if count is not None:
        if count < 0:
            raise UserError(f"count must be at least 0, got {count}")
    elif not 0 < ratio <= 1:
        raise UserError(f"ratio must be above 0 and at most 1, got {ratio}")

    def budget(params: Params, candidates: Chosen) -> int:
        total, there = num_entries(params), sum(int(np.prod(x.shape)) for x in candidates.values())
        head = num_entries(params.get("classifier", {})) if head_counts else 0
        wanted = int(ratio * total) if count is None else count
        said = f"count {count:,}" if count is not None else f"ratio {ratio} of {total:,} parameters is {wanted:,}"
        if wanted < head:
            raise UserError(f"{said}: less than the head's {head:,}, which always trains: raise it")
        if count is not None and wanted - head > there:
            raise UserError(f"{said}: more than the {there + head:,} that can train: lower it")
        return min(wanted - head, there)

    return budget
