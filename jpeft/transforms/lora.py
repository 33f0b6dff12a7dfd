"""Low-rank adaptation of any Dense layer (Hu et al. 2021, arXiv:2106.09685; reference: microsoft/LoRA)."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError
from jpeft.site import Site, Sites, find
from jpeft.transform import Call, Context, Leaves, Params, Transform, init_sites, site_key
from jpeft.transforms.linear import dropout as drop
from jpeft.transforms.linear import kaiming_uniform, positive, rate, sizes
from jpeft.tree import replace

__all__ = ["lora"]


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> Transform:
    """y = x W + (alpha / rank) x A B, with W frozen.

    A [in, rank] starts from U(-1/sqrt(in), 1/sqrt(in)), B [rank, out] from 0, so a fresh LoRA leaves the output
    bit-identical. The product is taken as (x A) B: a materialised W + A B costs more in training and is only made by
    `merge`, after which inference costs nothing.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate at which entries of x are dropped on their way into A, in training.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out]}}.

    Raises:
      UserError: if a size or rate is out of range; in `init`, if a target is missing or is not a Dense layer.
    """
    sizes(rank=rank)
    positive(alpha=alpha)
    rate(dropout=dropout)
    scale = alpha / rank

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params

        def make(key: Array, site: Site) -> dict[str, Array]:
            shape_in, shape_out = dense_shape(site)
            return {"a": kaiming_uniform(key, (shape_in, rank)), "b": jnp.zeros((rank, shape_out))}

        return init_sites(key, find(sites, targets, layers), make)

    def wrap(leaves: dict[str, Array], site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        y = call(x)
        x = drop(x, dropout, site_key(ctx.key, site.path) if ctx.key is not None else None).astype(y.dtype)
        return y + (x @ leaves["a"].astype(y.dtype)) @ leaves["b"].astype(y.dtype) * jnp.asarray(scale, y.dtype)

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, leaf in leaves.items():
            params = replace(params, f"{path}/kernel", lambda w, leaf=leaf: w + scale * (leaf["a"] @ leaf["b"]))
        return params

    return Transform("lora", init, wrap, merge)


def dense_shape(site: Site) -> tuple[int, int]:
    """(in, out) of a site that is a Dense layer; a UserError for any other site."""
    kernel = site.params.get("kernel")
    if kernel is None or len(kernel.shape) != 2:
        raise UserError(f"site {site.path!r} is a {site.kind} without a two-dimensional kernel: name Dense layers")
    return kernel.shape
