"""BitFit: trains every bias (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from collections.abc import Sequence

from jpeft.core.site import ALL
from jpeft.core.transform import Transform
from jpeft.transforms.parts.existing import retrain
from jpeft.transforms.parts.places import find_with_params

__all__ = ["bitfit"]


def bitfit(layers: Sequence[int] | None = None, targets: str = ALL) -> Transform:
    """Trains every bias, including those of LayerNorms and pooler (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199).

    Args:
      layers: only in these layers; None means everywhere.
      targets: pattern of the sites whose biases train, see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"bias": [n]}}.

    Raises:
      UserError: in `init`, if a target is missing, no target has a bias, or no parameters are given.
    """
    return retrain("bitfit", lambda sites: find_with_params(sites, targets, layers), lambda name: name == "bias")
