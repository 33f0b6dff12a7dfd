"""Trains only the LayerNorms (Houlsby et al. 2019, arXiv:1902.00751)."""

from collections.abc import Sequence

from jpeft.core.site import ALL
from jpeft.core.transform import Transform
from jpeft.transforms.parts.existing import retrain
from jpeft.transforms.parts.places import find_norms

__all__ = ["layer_norm"]


def layer_norm(layers: Sequence[int] | None = None, targets: str = ALL) -> Transform:
    """Trains the LayerNorms, as Houlsby et al. 2019 (arXiv:1902.00751) do along with their adapters.

    Args:
      layers: only in these layers; None means everywhere, including the embeddings' LayerNorm.
      targets: pattern of the normalisation layers, see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"scale": [d], "bias": [d]}}.

    Raises:
      UserError: in `init`, if a target is missing or no parameters are given.
    """
    return retrain("layer_norm", lambda sites: find_norms(sites, targets, layers), lambda name: True)
