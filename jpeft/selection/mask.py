"""Training single entries of the base: FISH mask, and a random mask of the same size as its control.

The leaves are the chosen entries themselves, {site path: {parameter: {"values": [k], "fixed": {"index": int32 [k]}}}},
where `index` counts through the flattened parameter. Inside the forward pass they are written over a copy of the
parameter; so the optimiser's state, weight decay, clipping and the saved file see k entries and nothing else, and what
was not chosen stays bit-identical. Nothing is added at inference: `merge` writes them for good.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.fisher import fisher
from jpeft.selection.existing import BODY, own_parameters
from jpeft.site import Sites, find
from jpeft.transform import FIXED, Leaves, Params, Setting, Transform
from jpeft.transforms.linear import sizes
from jpeft.tree import at, count, flatten, replace, unflatten, union

__all__ = ["fish", "random_mask", "take", "top"]

Chosen = Mapping[tuple[str, str], Any]  # by (site path, parameter name)
LABELS = ("empirical", "expected")
VALUES = ("square", "absolute")


def fish(
    ratio: float = 0.005,
    num_examples: int = 1024,
    labels: str = "empirical",
    values: str = "square",
    targets: str = BODY,
) -> Transform:
    """FISH mask: trains the entries with the largest Fisher information (Sung et al. 2021, arXiv:2111.09839).

    The budget is int(ratio * all parameters of the model); the head always trains and is part of it, as in the
    reference (varunnair18/FISH). The rest goes to the entries whose Fisher information is largest, over all targets
    together. `init` draws entries at random; `prepare` chooses them by data.

    Args:
      ratio: trained share of all parameters, the head's included.
      num_examples: how many training examples the information is averaged over.
      labels: "empirical" takes the true label of each example, "expected" all labels as probable as the model holds
        them.
      values: "square" or "absolute" values of the gradients.
      targets: pattern of the sites whose entries can be chosen, see `jpeft.find`.

    Returns:
      A transform with leaves as above.

    Raises:
      UserError: if an option is out of range; in `init`, if the budget does not even hold the head.
    """
    _check(ratio)
    sizes(num_examples=num_examples)
    for name, value, known in (("labels", labels, LABELS), ("values", values, VALUES)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown: {nearest(value, known)}")

    def prepare(setting: Setting) -> Leaves:
        params = setting.variables["params"]
        candidates = _candidates(params, setting.sites, targets)
        part = unflatten({(*path.split("/"), name): x for (path, name), x in candidates.items()})
        # Without its own leaves, which would stand in the place of the entries that were drawn at first.
        rest = {"params": params, "peft": {**setting.variables["peft"], setting.instance: {}}}
        of = setting.loss if labels == "empirical" else setting.logits

        def value(part: Params, example: Any, rest: Params) -> Array:
            return of(union(rest, {"params": part}), example)

        scores = flatten(fisher(value, part, setting.sample(num_examples), rest, labels=labels, values=values))
        by_site = {(path, name): np.asarray(scores[(*path.split("/"), name)]) for path, name in candidates}
        return take(candidates, top(by_site, _budget(ratio, params, candidates)))

    return _masked("fish", ratio, targets)._replace(prepare=prepare)


def random_mask(ratio: float = 0.005, targets: str = BODY) -> Transform:
    """Trains entries drawn at random, as many as FISH mask does: the control of Sung et al. 2021, arXiv:2111.09839.

    Args:
      ratio: trained share of all parameters, the head's included.
      targets: pattern of the sites whose entries can be drawn, see `jpeft.find`.

    Returns:
      A transform with leaves as above.

    Raises:
      UserError: as `fish`.
    """
    _check(ratio)
    return _masked("random_mask", ratio, targets)


def top(scores: Mapping[Any, np.ndarray], k: int) -> dict[Any, np.ndarray]:
    """The k largest entries over all arrays together: {name: sorted flat int32 indices}, arrays without any left out.

    Of equal entries the earlier ones win, in the order of `scores` and then of the flattened array.
    """
    flat = np.concatenate([np.asarray(x).ravel() for x in scores.values()])
    keep = np.zeros(flat.size, bool)
    if k > 0:
        threshold = np.partition(flat, flat.size - k)[flat.size - k]
        keep = flat > threshold
        ties = np.flatnonzero(flat == threshold)
        keep[ties[: k - int(keep.sum())]] = True
    ends = np.cumsum([x.size for x in scores.values()])
    parts = np.split(keep, ends[:-1])
    found = {name: np.flatnonzero(part).astype(np.int32) for name, part in zip(scores, parts, strict=True)}
    return {name: index for name, index in found.items() if index.size}


def take(values: Chosen, indices: Mapping[tuple[str, str], np.ndarray]) -> Leaves:
    """The leaves that hold the entries of `values` at flat `indices`."""
    leaves: Leaves = {}
    for (path, name), index in indices.items():
        entries = jnp.asarray(values[path, name]).reshape(-1)[index]
        leaves.setdefault(path, {})[name] = {"values": entries, FIXED: {"index": jnp.asarray(index)}}
    return leaves


def _masked(name: str, ratio: float, targets: str) -> Transform:
    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        if params is None:
            raise UserError(f"{name} starts from the model's parameters: give `params` to init")
        candidates = _candidates(params, sites, targets)
        sizes_ = [int(np.prod(x.shape)) for x in candidates.values()]
        # Which entries are drawn decides the shapes of the leaves, so it must happen outside of tracing.
        drawn = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel()).permutation(sum(sizes_))
        order = drawn.astype(np.int64)[: _budget(ratio, params, candidates)]
        ends = np.cumsum(sizes_)
        of, start = np.searchsorted(ends, order, side="right"), ends - sizes_
        indices = {place: np.sort(order[of == i] - start[i]).astype(np.int32) for i, place in enumerate(candidates)}
        return take(candidates, {place: index for place, index in indices.items() if index.size})

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


def _budget(ratio: float, params: Params, candidates: Chosen) -> int:
    """How many entries are chosen: the budget less what trains anyway, the head."""
    total, there = count(params), sum(int(np.prod(x.shape)) for x in candidates.values())
    head = count(params.get("classifier", {}))
    budget = int(ratio * total)
    if budget < head:
        raise UserError(f"ratio {ratio} of {total:,} parameters is {budget:,}, less than the head's {head:,}: raise it")
    return min(budget - head, there)


def _check(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise UserError(f"ratio must be above 0 and at most 1, got {ratio}")
