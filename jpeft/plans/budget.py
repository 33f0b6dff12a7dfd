"""The best plan under a budget: which module, of which size, if any, each layer gets."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jpeft.core.errors import UserError
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.plans.plan import Plan

__all__ = ["Cost", "allocate"]


class Cost(NamedTuple):
    """The parameters of a candidate.

    Attributes:
      own: in one layer.
      shared: once, wherever it is used at all, such as a prefix's MLP.
    """

    own: int
    shared: int = 0


def allocate(scores: Scores, candidates: Candidates, costs: Mapping[str, Cost], budget: float) -> Plan:
    """The plan of the highest total score whose parameters fit the budget; exact.

    Each layer gets at most one candidate. Only candidates with a positive score are of use, and a layer without one
    gets nothing. It is an integer program (a knapsack with choices, and a fixed charge for what layers share), which
    SciPy's HiGHS solves.

    Args:
      scores: {layer: {candidate: score}}.
      candidates: what they are called.
      costs: their parameters.
      budget: the most parameters that the plan may have.

    Returns:
      The plan: {layer: [module]} for every layer that gets one.

    Raises:
      UserError: if no module fits the budget, or none has a positive score.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(layer, name) for layer, row in scores.items() for name in row]
    names = list(candidates)
    if not any(scores[layer][name] > 0 for layer, name in pairs):
        raise UserError("no candidate has a positive score in any layer: measure more examples (fishpal.num_examples)")
    # One variable for each pair, and one for each candidate that says whether it is used at all.
    values = np.array([*(scores[layer][name] for layer, name in pairs), *(0.0 for _ in names)])
    largest = np.abs(values).max()
    cost = np.array([*(costs[name].own for _, name in pairs), *(costs[name].shared for name in names)], float)
    one_each = np.array([[float(own == layer) for own, _ in pairs] + [0.0] * len(names) for layer in scores])
    used = np.zeros((len(pairs), len(values)))
    for i, (_, name) in enumerate(pairs):
        used[i, i], used[i, len(pairs) + names.index(name)] = 1.0, -1.0
    solved = milp(
        -1e6 * values / largest,  # HiGHS gives up an absolute millionth
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},  # and by default a ten-thousandth of the total
        constraints=[
            LinearConstraint(cost[None], ub=budget),
            LinearConstraint(one_each, ub=1),
            LinearConstraint(used, ub=0),
        ],
    )
    kept = [pair for pair, x in zip(pairs, solved.x, strict=False) if x > 0.5]
    if not kept:
        smallest = min(own + shared for own, shared in costs.values())
        raise UserError(f"the budget of {budget:,.0f} parameters is too small: the smallest module has {smallest:,}")
    return {layer: [candidates[name]] for layer, name in sorted(kept)}
