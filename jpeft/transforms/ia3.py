"""(IA)3: learned vectors that scale keys, values and the feed-forward's inner activations.

Liu et al. 2022, arXiv:2205.05638; reference: r-three/t-few.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.leaves import init_sites, merge_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.low_rank import dense_shape, find_dense, flat

__all__ = ["ia3"]

PLACES = {"after": "ffn/output", "before": "ffn/intermediate"}
_READS = re.compile(r"(?:.*/)?output")  # Dense layers whose input is scaled; for all others it is the output


def ia3(placement: str = "after", targets: str | None = None, layers: Sequence[int] | None = None) -> Transform:
    """Scales keys, values and the feed-forward's inner activations, before or after the GELU, by trained vectors.

    y = (x W + b) * l at key, value and `ffn/intermediate`; y = (x * l) W + b at `ffn/output`. l starts at 1, so a fresh
    (IA)3 leaves the output bit-identical. Merged into kernels and biases, it costs nothing at inference.

    Args:
      placement: "after" the activation, as in the paper and Hugging Face peft, or "before" it, as in AdapterHub.
      targets: pattern of the Dense layers, see `jpeft.find`, in place of key, value and `placement`. Layers named
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

        return init_sites(key, find_dense(sites, pattern, layers), make)

    def wrap(leaves: dict[str, Array], site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        x, *rest = args
        if _READS.fullmatch(site.path):
            return call(_scaled(x, leaves["scale"]), *rest)
        return _scaled(call(x, *rest), leaves["scale"])

    def merge(leaves: Leaves, params: Params) -> Params:
        def merged(path: str, own: Leaves, old: Params) -> Params:
            scale = own["scale"]
            if _READS.fullmatch(path):
                rows = old["kernel"].reshape(len(scale), -1) * scale[:, None]
                return {**old, "kernel": rows.reshape(old["kernel"].shape)}
            # the last axes of kernel and bias, if any, are the scaled ones
            return {name: _scaled(x, scale) for name, x in old.items()}

        return merge_sites(leaves, params, merged)

    return Transform("ia3", init, wrap, merge)


def _scaled(x: Array, scale: Array) -> Array:
    rows = flat(x, len(scale))
    return (rows * scale.astype(x.dtype).reshape((1,) * (rows.ndim - 1) + (-1,))).reshape(x.shape)
