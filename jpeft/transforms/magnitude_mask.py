"""Trains the largest entries: the second control of FISH mask, which uses no data."""

from jpeft.core.site import ALL
from jpeft.core.transform import Transform
from jpeft.importance import masks
from jpeft.transforms.parts.entries import budget_of, masked

__all__ = ["magnitude_mask"]


def magnitude_mask(
    ratio: float = 0.005, count: int | None = None, head_counts: bool = True, targets: str = ALL
) -> Transform:
    """Trains the entries that are largest in absolute value, as many as FISH mask does: a control that needs no data.

    The criterion is that of pruning by magnitude (Han et al. 2015, arXiv:1506.02626).

    Args:
      ratio: as in `fish`.
      count: as in `fish`.
      head_counts: as in `fish`.
      targets: as in `fish`.

    Returns:
      A transform with leaves as in `fish`.

    Raises:
      UserError: as `fish`.
    """
    budget = budget_of(ratio, count, head_counts)
    return masked("magnitude_mask", budget, targets, lambda key, values, k: masks.magnitude(values, k))
