"""Trains the last layers and the pooler (Houlsby et al. 2019, arXiv:1902.00751)."""

from jpeft.core.errors import UserError
from jpeft.core.site import Site, Sites, layers
from jpeft.core.transform import Transform
from jpeft.transforms.parts.existing import retrain
from jpeft.transforms.parts.linear import sizes

__all__ = ["top_k_layers"]


def top_k_layers(num_layers: int = 2) -> Transform:
    """Trains all of the last layers and the pooler above them, a baseline of Houlsby et al. 2019 (arXiv:1902.00751).

    Args:
      num_layers: k, the number of layers from the top.

    Returns:
      A transform with leaves {path: the parameters of that site}.

    Raises:
      UserError: if `num_layers` is not a positive integer; in `init`, if the model has fewer layers or no parameters
        are given.
    """
    sizes(num_layers=num_layers)

    def where(sites: Sites) -> tuple[Site, ...]:
        have = layers(sites)
        if len(have) < num_layers:
            raise UserError(f"num_layers must be at most {len(have)}, the layers of the model, got {num_layers}")
        top = set(have[-num_layers:])
        last = max(i for i, site in enumerate(sites.values()) if site.layer is not None)
        after = set(list(sites)[last + 1 :])  # the pooler, in the order of the forward pass
        return tuple(site for path, site in sites.items() if not site.head and (site.layer in top or path in after))

    return retrain("top_k_layers", where, lambda name: True)
