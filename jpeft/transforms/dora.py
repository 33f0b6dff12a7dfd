"""Weight-decomposed low-rank adaptation, DoRA (Liu et al. 2024, arXiv:2402.09353; reference: NVlabs/DoRA)."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.leaves import init_sites, merge_sites, wide
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.linear import need_params
from jpeft.transforms.parts.low_rank import (
    LowRank,
    dense_shape,
    faster_b,
    fresh,
    low_rank,
    product,
    scale_at,
    where,
)

__all__ = ["dora"]


def dora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
    rank_pattern: Mapping | None = None,
    alpha_pattern: Mapping | None = None,
    learning_rate_ratio: float = 1.0,
) -> Transform:
    """y = x W' diag(m / |W'|) + bias with W' = W + (alpha / rank) A B and |W'| the norms of its columns.

    LoRA sets the directions of the columns of W, the magnitude m [out] their lengths. m starts as |W| and B as 0, so a
    fresh DoRA leaves the output unchanged. As in section 4.3 of the paper (and in peft), gradients treat |W'| as a
    constant. The norm needs A B, [in, out] and independent of the input, once per forward pass; the output is computed
    from x W and (x A) B. After `merge`, inference costs nothing.

    |W'| uses only the base's W. So where DoRA comes after another member of a chain, such as a LoRA at the same site,
    neither of the two can be merged; if it comes first, it can.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate of dropout on the input of A, in training. (In peft, x is also dropped in (m / |W'| - 1) x W.)
      rank_pattern: {pattern: rank}, as in `lora`.
      alpha_pattern: {pattern: alpha}, as in `lora`.
      learning_rate_ratio: B's learning rate divided by that of the other leaves.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out], "magnitude": [out]}}.

    Raises:
      UserError: as `lora`; in `init`, if no parameters are given.
    """
    spec = low_rank(rank, alpha, targets, layers, dropout, rank_pattern, alpha_pattern)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        def make(key: Array, site: Site, own: Params) -> Leaves:
            return {**fresh(spec, key, site), "magnitude": _norms(own["kernel"].reshape(dense_shape(site)))}

        return init_sites(key, where(spec, sites), make, need_params(params, "dora"))

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        x, *rest = args
        y = call(x, *rest)
        base = wide(dict(ctx.params))
        norms = jax.lax.stop_gradient(_norms(_updated(spec, site.path, leaves, base["kernel"])))
        kernel = base["kernel"]
        trailing = kernel.shape[-_axes(leaves, kernel) :]
        row = (1,) * (y.ndim - len(trailing)) + trailing
        factor = (leaves["magnitude"] / norms).reshape(row)
        linear = y - base["bias"].astype(y.dtype).reshape(row) if "bias" in base else y
        update = product(spec, x, leaves["a"], leaves["b"], site, ctx, y)
        # Written as changes to y, so that a fresh DoRA changes nothing.
        scale = scale_at(spec, site.path, leaves)
        return y + linear * (factor - 1).astype(y.dtype) + update * (scale * factor).astype(y.dtype)

    def merge(leaves: Leaves, params: Params) -> Params:
        def merged(path: str, own: Leaves, old: Params) -> Params:
            turned = _updated(spec, path, own, old["kernel"])
            kernel = turned * (own["magnitude"] / _norms(turned)).reshape(1, -1)
            return {**old, "kernel": kernel.reshape(old["kernel"].shape)}

        return merge_sites(leaves, params, merged)

    return Transform(
        "dora", init, wrap, merge, rate=faster_b(learning_rate_ratio), reads_params=True, needs_float32=True
    )


def _updated(spec: LowRank, path: str, leaves: Leaves, kernel: Array) -> Array:
    """W + scale A B as a matrix [in, out], in full float32 on every device: the output is divided by its norm."""
    update = jnp.matmul(leaves["a"], leaves["b"], precision=jax.lax.Precision.HIGHEST)
    return kernel.reshape(update.shape) + scale_at(spec, path, leaves) * update


def _axes(leaves: Leaves, kernel: Array) -> int:
    """The number of the kernel's last axes that belong to the output."""
    return next(n for n in range(1, kernel.ndim) if math.prod(kernel.shape[-n:]) == leaves["b"].shape[-1])


def _norms(kernel: Array) -> Array:
    """The norms of the columns [out], above zero even for an empty column."""
    return jnp.maximum(jnp.linalg.norm(kernel, axis=0), jnp.finfo(kernel.dtype).tiny)
