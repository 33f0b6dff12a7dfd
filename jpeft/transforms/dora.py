"""Weight-decomposed low-rank adaptation, DoRA (Liu et al. 2024, arXiv:2402.09353; reference: NVlabs/DoRA)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.site import Site, Sites
from jpeft.transform import Call, Context, Leaves, Params, Transform, init_sites
from jpeft.transforms.low_rank import LowRank, faster_b, fresh, kernel_at, low_rank, product, scale_at, where
from jpeft.tree import replace

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

    LoRA turns the columns of W, the magnitude m [out] sets their lengths. m starts as |W| and B as 0, so a fresh DoRA
    leaves the output unchanged. As in section 4.3 of the paper (and in peft), |W'| is taken for a constant when
    gradients are made. The norm needs A B once a forward pass, [in, out] and independent of the input; the output is
    put together from x W and (x A) B. `merge` makes inference free.

    At a site that it shares with others of a chain, write it first: |W'| knows of the base's W only, so merging
    one that comes after a LoRA gives other outputs than running it.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate at which entries of x are dropped on their way into A, in training. (In peft, x is dropped in
        (m / |W'| - 1) x W as well.)
      rank_pattern: {pattern: rank}, as in `lora`.
      alpha_pattern: {pattern: alpha}, as in `lora`.
      learning_rate_ratio: B's learning rate over the others'.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out], "magnitude": [out]}}.

    Raises:
      UserError: as `lora`; in `init`, if it is not given the parameters to start from.
    """
    spec = low_rank(rank, alpha, targets, layers, dropout, rank_pattern, alpha_pattern)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        def make(key: Array, site: Site) -> Leaves:
            factors = fresh(spec, key, site)
            return {**factors, "magnitude": _norms(kernel_at(params, site.path))}

        return init_sites(key, where(spec, sites), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        y = call(x)
        row = (1,) * (y.ndim - 1) + (-1,)
        norms = jax.lax.stop_gradient(_norms(_updated(spec, site.path, leaves, ctx.params["kernel"])))
        factor = (leaves["magnitude"] / norms).reshape(row)
        linear = y - ctx.params["bias"].astype(y.dtype).reshape(row) if "bias" in ctx.params else y
        update = product(spec, x, leaves["a"], leaves["b"], site, ctx, y)
        # Written as changes to y, so that a fresh one changes nothing.
        scale = scale_at(spec, site.path, leaves)
        return y + linear * (factor - 1).astype(y.dtype) + update * (scale * factor).astype(y.dtype)

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            turned = _updated(spec, path, own, kernel_at(params, path))
            kernel = turned * (own["magnitude"] / _norms(turned)).reshape(1, -1)
            params = replace(params, f"{path}/kernel", lambda _, kernel=kernel: kernel)
        return params

    return Transform("dora", init, wrap, merge, rate=faster_b(learning_rate_ratio))


def _updated(spec: LowRank, path: str, leaves: Leaves, kernel: Array) -> Array:
    return kernel + scale_at(spec, path, leaves) * (leaves["a"] @ leaves["b"])


def _norms(kernel: Array) -> Array:
    """The norms of the columns [out], above zero even for an empty column."""
    return jnp.maximum(jnp.linalg.norm(kernel, axis=0), jnp.finfo(kernel.dtype).tiny)
