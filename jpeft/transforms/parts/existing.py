"""Trains existing parameters of the model: shared code of BitFit, the top layers and the LayerNorms.

Each is a transform whose leaves are copies of the chosen parameters, which replace the originals inside the forward
pass. The base stays as loaded, the optimiser sees only the copies, and XLA drops all other gradients. Nothing is added
at inference: `merge` writes the copies into the base.

The leaves are {site path: {"kernel": ..., "bias": ...}}, with the names and shapes of the site's parameters.
"""

from collections.abc import Callable, Sequence

from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import wide
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Leaves, Params, Transform
from jpeft.core.tree import at, replace
from jpeft.transforms.parts.linear import need_params
from jpeft.transforms.parts.places import own_parameters

__all__ = ["retrain"]


def retrain(name: str, where: Callable[[Sites], Sequence[Site]], trains: Callable[[str], bool]) -> Transform:
    """The transform that trains copies of the parameters for which `trains(name)` is true, at the sites `where`."""

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del key
        params = need_params(params, name)
        leaves: Leaves = {}
        for site in where(sites):
            own = [leaf for leaf in own_parameters(site) if trains(leaf)]
            if own:
                leaves[site.path] = wide({leaf: at(params, f"{site.path}/{leaf}") for leaf in own})
        if not leaves:
            raise UserError(f"{name} finds no parameters at the given sites")
        return leaves

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            for leaf, x in own.items():  # one by one: beside them there may be a quantised kernel
                params = replace(params, f"{path}/{leaf}", lambda _, x=x: x)
        return params

    return Transform(name, init, None, merge)
