"""(IA)3: learned vectors that scale keys, values and the feed-forward's inner activations.

Liu et al. 2022, arXiv:2205.05638; reference: r-three/t-few.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.site import Site, Sites, find
from jpeft.transform import Call, Context, Leaves, Params, Transform, init_sites
from jpeft.transforms.low_rank import dense_shape
from jpeft.tree import replace

__all__ = ["ia3"]

PLACES = {"after": "ffn/output", "before": "ffn/intermediate"}
_READS = re.compile(r"(?:.*/)?output")  # Dense layers whose input is scaled; of all others it is the output


def ia3(placement: str = "after", targets: str | None = None, layers: Sequence[int] | None = None) -> Transform:
    """Scales keys and values by vectors of ones, and the feed-forward's inner activations before or after the GELU.

    y = (x W + b) * l at key, value and `ffn/intermediate`; y = (x * l) W + b at `ffn/output`. A fresh one changes
    nothing, bit by bit. It merges into kernels and biases, and then costs nothing at inference.

    Args:
      placement: "after" the activation, as the paper and Hugging Face peft have it, or "before" it, as AdapterHub.
      targets: pattern of the Dense layers, see `jpeft.find`, in the place of key, value and `placement`. Layers named
        "output" are scaled at their input, all others at their output. peft's own default for BERT is
        "key|value|attention/output|ffn/output".
      layers: only in these layers; None means all.

    Returns:
      A transform with leaves {path: {"scale": [n]}}.

    Raises:
      UserError: if the placement is unknown; in `init`, if a target is missing or is not a Dense layer.
    """
    if placement not in PLACES:
        raise UserError(f"placement {placement!r} is unknown: {nearest(placement, PLACES)}")
    pattern = targets or f"attention/key|attention/value|{PLACES[placement]}"

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params

        def make(key: Array, site: Site) -> dict[str, Array]:
            del key
            n_in, n_out = dense_shape(site)
            return {"scale": jnp.ones(n_in if _READS.fullmatch(site.path) else n_out)}

        return init_sites(key, find(sites, pattern, layers), make)

    def wrap(leaves: dict[str, Array], site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        if _READS.fullmatch(site.path):
            return call(_scaled(x, leaves["scale"]))
        return _scaled(call(x), leaves["scale"])

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, leaf in leaves.items():
            scale = leaf["scale"]
            if _READS.fullmatch(path):
                params = replace(params, f"{path}/kernel", lambda w, s=scale: w * s[:, None])
            else:  # kernel [in, out] and bias [out], if there is one, end in the axis that is scaled
                params = replace(params, path, lambda p, s=scale: {name: _scaled(x, s) for name, x in p.items()})
        return params

    return Transform("ia3", init, wrap, merge)


def _scaled(x: Array, scale: Array) -> Array:
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
