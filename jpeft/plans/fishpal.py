"""The thesis' rule of FishPAL: one module per layer, by the Fisher information of the candidates at initialisation.

This is `config.fishpal.criterion=thesis` (code: lucalila/fishpal); by default a run holds a race. Put every candidate
into every layer of the frozen encoder. Compute the diagonal empirical Fisher information F of their parameters. Score
candidate c in layer l by the mean of F over its parameters there, times a factor that makes the kinds of modules
comparable:

    score[l, c] = factor[c] * n * (sum of F over own[l, c] and shared[c]) / (number of entries in them)

where n F is the sum over the n examples, as in the thesis. Shared parameters (a prefix's embedding and MLP) count in
every layer. A leaf whose Fisher information is all zero does not count: LoRA's A has no gradient while B is zero, and
would only dilute the mean. Each layer keeps the candidate with the highest score.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.site import layer_of
from jpeft.core.transform import SHARED, Chain, Leaves, chain, instances, members
from jpeft.plans.plan import Entry, Plan, make

__all__ = ["CANDIDATES", "FACTORS", "Candidates", "Scores", "attach", "choose", "scores"]

Candidates = Mapping[str, Entry]
Scores = dict[int, dict[str, float]]  # {layer: {candidate: score}}

CANDIDATES: Candidates = {"prefix": Entry("prefix"), "pfeiffer": Entry("pfeiffer"), "lora": Entry("lora")}
FACTORS: Mapping[str, float] = {"prefix": 10_000.0, "pfeiffer": 5.0, "lora": 1.0}


def attach(candidates: Candidates = CANDIDATES) -> Chain:
    """The chain with every candidate in every layer, in the order of `candidates`.

    Raises:
      UserError: if there are no candidates, or one does not exist.
    """
    if not candidates:
        raise UserError("FishPAL needs at least one candidate")
    return chain(*(make(entry.method, **entry.options) for entry in candidates.values()))


def scores(
    fisher: Leaves,
    num_examples: int,
    candidates: Candidates = CANDIDATES,
    factors: Mapping[str, float] = FACTORS,
) -> Scores:
    """Scores every candidate in every layer.

    Args:
      fisher: the mean of squared per-example gradients with respect to the leaves of `attach(candidates)`, from
        `jpeft.fisher`.
      num_examples: n, the number of examples in that mean.
      candidates: as given to `attach`.
      factors: {candidate: factor}; 1 for any other candidate.

    Returns:
      {layer: {candidate: score}}; a candidate whose gradients are all zero scores 0.

    Raises:
      UserError: if a factor does not belong to a candidate, or a candidate has leaves outside the layers.
    """
    for name in set(factors) - set(candidates) - set(FACTORS):
        raise UserError(f"factor for {name!r}, which is not a candidate: expected one of {', '.join(candidates)}")
    table: Scores = {}
    named = iter(instances(attach(candidates)))
    for candidate, entry in candidates.items():
        totals: dict[int, np.ndarray] = {}
        for instance in itertools.islice(named, len(members(make(entry.method, **entry.options)))):
            by_site = dict(fisher[instance])
            shared = _total(by_site.pop(SHARED, {}))
            own: dict[int, np.ndarray] = {}
            for path, leaves in by_site.items():
                layer = layer_of(path)
                if layer is None:
                    raise UserError(f"candidate {candidate!r} has leaves at {path!r}, which is not in a layer")
                own[layer] = own.get(layer, shared) + _total(leaves)
            for layer, total in own.items():
                totals[layer] = totals.get(layer, np.zeros(2)) + total
        for layer, (summed, count) in totals.items():
            mean = summed / count if count else 0.0
            table.setdefault(layer, {})[candidate] = float(factors.get(candidate, 1.0) * num_examples * mean)
    return {layer: table[layer] for layer in sorted(table)}


def _total(leaves: Any) -> np.ndarray:
    """[sum, number of entries] over the leaves that are not all zero, in float64."""
    arrays = [np.asarray(x, np.float64) for x in jax.tree.leaves(leaves)]
    counted = [x for x in arrays if x.any()]
    return np.array([sum(x.sum() for x in counted), sum(x.size for x in counted)], np.float64)


def choose(scores: Scores, candidates: Candidates = CANDIDATES) -> Plan:
    """The plan with the best candidate of each layer; ties go to the first one.

    Raises:
      UserError: if all scores of a layer are zero.
    """
    plan: Plan = {}
    for layer, row in scores.items():
        best = max(row, key=row.__getitem__)
        if not any(row.values()):
            raise UserError(f"no candidate of layer {layer} has any score: {row}")
        plan[layer] = [candidates[best]]
    return plan
