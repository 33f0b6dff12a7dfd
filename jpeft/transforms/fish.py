"""FISH mask: trains the entries with the largest Fisher information (Sung et al. 2021, arXiv:2111.09839)."""

from typing import Any

from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.site import ALL
from jpeft.core.transform import Leaves, Params, Setting, Transform
from jpeft.core.tree import flatten, unflatten, union
from jpeft.importance import masks
from jpeft.importance.fisher import LABELS, VALUES
from jpeft.transforms.parts.entries import budget_of, candidates_of, masked, take
from jpeft.transforms.parts.linear import sizes

__all__ = ["fish"]


def fish(
    ratio: float = 0.005,
    count: int | None = None,
    num_examples: int = 1024,
    labels: str = "empirical",
    values: str = "square",
    head_counts: bool = True,
    targets: str = ALL,
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
    budget = budget_of(ratio, count, head_counts)

    def prepare(setting: Setting) -> Leaves:
        params = setting.variables["params"]
        candidates = candidates_of(params, setting.sites, targets)
        part = unflatten({(*path.split("/"), name): x for (path, name), x in candidates.items()})
        # Without its own leaves, which would stand in the place of the entries that were drawn at first.
        rest = {"params": params, "peft": {**setting.variables["peft"], setting.instance: {}}}
        of = setting.loss if labels == "empirical" else setting.logits

        def value(part: Params, example: Any, rest: Params) -> Array:
            return of(union(rest, {"params": part}), example)

        scores = flatten(setting.fisher(value, part, num_examples, rest, labels=labels, values=values))
        by_site = {(path, name): scores[(*path.split("/"), name)] for path, name in candidates}
        return take(candidates, masks.top(by_site, budget(params, setting.sites, candidates)))

    return masked("fish", budget, targets, masks.random)._replace(prepare=prepare)
