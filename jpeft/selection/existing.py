"""Training parameters that the model already has: BitFit, the top layers, the LayerNorms.

Each is a transform whose leaves are copies of the chosen parameters, put in the place of the originals inside the
forward pass. The base stays as it was loaded, the optimiser sees the copies alone, and XLA drops the gradients of all
else. Nothing is added at inference: `merge` puts the copies into the base for good.

Reached as {site path: {"kernel": ..., "bias": ...}}, with the names and shapes that the site's parameters have.
"""

from collections.abc import Callable, Sequence

from jax import Array

from jpeft.errors import UserError
from jpeft.site import Site, Sites, find
from jpeft.site import layers as layers_of
from jpeft.transform import Leaves, Params, Transform
from jpeft.transforms.linear import sizes
from jpeft.tree import at, replace

__all__ = ["bitfit", "layer_norm", "top_k_layers"]

# The head trains anyway, under its own name.
BODY = "(embeddings|encoder|pooler)(/.*)?"


def bitfit(layers: Sequence[int] | None = None, targets: str = BODY) -> Transform:
    """Trains every bias, those of LayerNorms and pooler included (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199).

    Args:
      layers: only in these layers; None means everywhere.
      targets: pattern of the sites whose biases train, see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"bias": [n]}}.

    Raises:
      UserError: in `init`, if a target is missing, there is no bias, or no parameters are given.
    """
    return _retrain("bitfit", lambda sites: find(sites, targets, layers), lambda name: name == "bias")


def layer_norm(layers: Sequence[int] | None = None, targets: str = "LayerNorm") -> Transform:
    """Trains the LayerNorms, as Houlsby et al. 2019 (arXiv:1902.00751) do beside their adapters.

    Args:
      layers: only in these layers; None means everywhere, the embeddings' LayerNorm included.
      targets: pattern of the LayerNorms, see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"scale": [d], "bias": [d]}}.

    Raises:
      UserError: in `init`, if a target is missing or no parameters are given.
    """
    return _retrain("layer_norm", lambda sites: find(sites, targets, layers), lambda name: True)


def top_k_layers(num_layers: int = 2) -> Transform:
    """Trains the last layers whole and the pooler above them, as Houlsby et al. 2019 (arXiv:1902.00751) compare with.

    Args:
      num_layers: k, how many layers from the top.

    Returns:
      A transform with leaves {path: the parameters of that site}.

    Raises:
      UserError: if `num_layers` is no size; in `init`, if the model has fewer layers or no parameters are given.
    """
    sizes(num_layers=num_layers)

    def where(sites: Sites) -> tuple[Site, ...]:
        have = layers_of(sites)
        if len(have) < num_layers:
            raise UserError(f"num_layers must be at most {len(have)}, the layers of the model, got {num_layers}")
        top = set(have[-num_layers:])
        return tuple(site for path, site in sites.items() if site.layer in top or path.split("/")[0] == "pooler")

    return _retrain("top_k_layers", where, lambda name: True)


def _retrain(name: str, where: Callable[[Sites], Sequence[Site]], trains: Callable[[str], bool]) -> Transform:
    """The transform that trains copies of the parameters for which `trains(parameter name)`, at the sites `where`."""

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del key
        if params is None:
            raise UserError(f"{name} starts from the model's parameters: give `params` to init")
        leaves: Leaves = {}
        for site in where(sites):
            own = [leaf for leaf in own_parameters(site) if trains(leaf)]
            if own:
                values = at(params, site.path)
                leaves[site.path] = {leaf: values[leaf] for leaf in own}
        if not leaves:
            raise UserError(f"{name} finds no parameters at the sites that it was given")
        return leaves

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            params = replace(params, path, lambda there, own=own: {**there, **own})
        return params

    return Transform(name, init, None, merge)


def own_parameters(site: Site) -> tuple[str, ...]:
    """The names of the arrays that belong to a site itself, not to a module inside it."""
    return tuple(name for name, x in site.params.items() if hasattr(x, "shape"))
