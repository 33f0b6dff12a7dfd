"""KronA: a Kronecker product added to any Dense layer (Edalati et al. 2022, arXiv:2212.10650)."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import init_sites, merge_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.linear import dropout as drop
from jpeft.transforms.parts.linear import kaiming_uniform, positive, rate, sizes
from jpeft.transforms.parts.low_rank import add_to_kernel, dense_shape, find_dense, flat

__all__ = ["krona"]


def krona(
    shape: Sequence[int] | None = None,
    scale: float = 8.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
) -> Transform:
    """y = x W + s x (A kron B), with W frozen.

    A [a1, a2] starts from U(-1/sqrt(a1), 1/sqrt(a1)) and B [in / a1, out / a2] from 0, so a fresh KronA leaves the
    output bit-identical. The rank of the update is the product of the factors' ranks: with as many parameters as a
    LoRA of rank 1, it can be full. With x as an [a1, in / a1] matrix X, x (A kron B) is A' X B, so two small products
    are enough. Only `merge` computes the [in, out] product; after that inference costs nothing.

    Args:
      shape: (a1, a2), which divide in and out; None uses the factors of in and out nearest to their square roots, in's
        larger one in A and out's larger one in B. For [768, 768] that is [32, 24] and [24, 32], as many parameters as
        a LoRA of rank 1.
      scale: s. 8 is our choice: on one small random model it learned as fast as a LoRA does at half the learning rate,
        where 1 took about ten times LoRA's.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate of dropout on x before the product, in training.

    Returns:
      A transform with leaves {path: {"a": [a1, a2], "b": [in / a1, out / a2]}}.

    Raises:
      UserError: if an option is out of range; in `init`, if a target is missing or is not a Dense layer, or if `shape`
        does not divide the shape of its kernel.
    """
    positive(scale=scale)
    rate(dropout=dropout)
    if shape is not None:
        if len(shape) != 2:
            raise UserError(f"shape must be two numbers, got {tuple(shape)}")
        sizes(**{f"shape[{i}]": size for i, size in enumerate(shape)})

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params

        def make(key: Array, site: Site) -> Leaves:
            whole = dense_shape(site)
            a1, a2 = shape or (whole[0] // _divisor(whole[0]), _divisor(whole[1]))
            if whole[0] % a1 or whole[1] % a2:
                raise UserError(f"shape {(a1, a2)} does not divide {whole}, the kernel's shape at {site.path!r}")
            return {"a": kaiming_uniform(key, (a1, a2)), "b": jnp.zeros((whole[0] // a1, whole[1] // a2))}

        return init_sites(key, find_dense(sites, targets, layers), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        x, *rest = args
        y = call(x, *rest)
        a, b = leaves["a"].astype(y.dtype), leaves["b"].astype(y.dtype)
        x = drop(x, dropout, ctx.key_at(site.path)).astype(y.dtype)
        x = flat(x, a.shape[0] * b.shape[0])
        x = x.reshape(*x.shape[:-1], a.shape[0], b.shape[0]) @ b
        return y + jnp.einsum("...io,ia->...ao", x, a).reshape(y.shape) * jnp.asarray(scale, y.dtype)

    def merge(leaves: Leaves, params: Params) -> Params:
        return merge_sites(
            leaves, params, lambda path, own, old: add_to_kernel(old, scale * jnp.kron(own["a"], own["b"]))
        )

    return Transform("krona", init, wrap, merge)


def _divisor(n: int) -> int:
    """The largest divisor of n that is at most its square root."""
    return next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
