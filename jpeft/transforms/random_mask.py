"""Trains random entries: the first control of FISH mask (arXiv:2111.09839)."""

from jpeft.core.site import ALL
from jpeft.core.transform import Transform
from jpeft.importance import masks
from jpeft.transforms.parts.entries import budget_of, masked

__all__ = ["random_mask"]


def random_mask(
    ratio: float = 0.005, count: int | None = None, head_counts: bool = True, targets: str = ALL
) -> Transform:
    """Trains random entries, as many as FISH mask does: the control of Sung et al. 2021, arXiv:2111.09839.

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
    return masked("random_mask", budget_of(ratio, count, head_counts), targets, masks.random)
