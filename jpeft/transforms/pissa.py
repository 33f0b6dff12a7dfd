"""LoRA from the principal singular vectors, PiSSA (Meng et al. 2024, arXiv:2404.02948; reference: GraphPKU/PiSSA)."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import init_sites, merge_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import FIXED, Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.linear import need_params
from jpeft.transforms.parts.low_rank import (
    add_to_kernel,
    dense_shape,
    faster_b,
    low_rank,
    product,
    rank_at,
    scale_at,
    where,
)

__all__ = ["difference", "pissa"]


def pissa(
    rank: int = 8,
    alpha: float = 8.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
    rank_pattern: Mapping | None = None,
    alpha_pattern: Mapping | None = None,
    learning_rate_ratio: float = 1.0,
) -> Transform:
    """y = x W + (alpha / rank) x (A B - A0 B0), where A0 B0 is the best approximation of W of that rank.

    With the singular value decomposition W = U S V, A0 = U sqrt(S rank / alpha) and B0 = sqrt(S rank / alpha) V for
    the largest singular values, and A and B start from them: training changes the principal part of W and leaves the
    rest. The paper (and peft) replaces W by W - A0 B0; here the base stays unchanged and A0, B0 are stored next to
    A, B, which gives the same function. A fresh PiSSA leaves the output unchanged.

    Both products are large, so their difference is computed as (A - A0) B + A0 (B - B0), which is as exact in bfloat16
    as LoRA is. Training costs as much as two LoRAs of that rank; after `merge`, inference costs nothing. `init`
    decomposes every target, which takes about a third of a second for [768, 768] on a CPU.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator; the paper uses the rank.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate of dropout on the input of the update, in training. (In peft, only on the input of A B.)
      rank_pattern: {pattern: rank}, as in `lora`.
      alpha_pattern: {pattern: alpha}, as in `lora`.
      learning_rate_ratio: B's learning rate divided by A's.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out], "fixed": {"a": A0, "b": B0}}}.

    Raises:
      UserError: as `lora`; in `init`, if no parameters are given, or the rank is larger than the number of a kernel's
        singular values.
    """
    spec = low_rank(rank, alpha, targets, layers, dropout, rank_pattern, alpha_pattern)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        def make(key: Array, site: Site, own: Params) -> Leaves:
            rank, shape = rank_at(spec, site.path), dense_shape(site)
            if rank > min(shape):
                raise UserError(f"rank {rank} at {site.path!r}, whose kernel {shape} has {min(shape)} singular values")
            u, s, v = jnp.linalg.svd(own["kernel"].reshape(shape), full_matrices=False)
            a, b = u[:, :rank], v[:rank]
            root = jnp.sqrt(s[:rank] / scale_at(spec, site.path, {"a": a}))
            start = {"a": a * root.reshape(1, -1), "b": root.reshape(-1, 1) * b}
            # A copy, because the training step may donate the buffers of `start`.
            return {**start, FIXED: jax.tree.map(jnp.copy, start)}

        return init_sites(key, where(spec, sites), make, need_params(params, "pissa"))

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        x, *rest = args
        y = call(x, *rest)
        scale = jnp.asarray(scale_at(spec, site.path, leaves), y.dtype)
        return y + product(spec, x, *difference(leaves), site, ctx, y) * scale

    def merge(leaves: Leaves, params: Params) -> Params:
        def merged(path: str, own: Leaves, old: Params) -> Params:
            a, b = difference(own)
            return add_to_kernel(old, scale_at(spec, path, own) * (a @ b))

        return merge_sites(leaves, params, merged)

    def factors(path: str, own: Leaves) -> tuple[Array, Array]:
        a, b = difference(own)
        return a, scale_at(spec, path, own) * b

    method = Transform("pissa", init, wrap, merge, rate=faster_b(learning_rate_ratio), factors=factors)
    # Decay would pull A and B to zero, and so the function away from the base.
    return method._replace(decay=lambda path, leaf: False)


def difference(leaves: Leaves) -> tuple[Array, Array]:
    """A B - A0 B0 as one product of twice the rank: [A - A0, A0] @ [B; B - B0]."""
    a, b, start = leaves["a"], leaves["b"], leaves[FIXED]
    return (
        jnp.concatenate([a - start["a"], start["a"]], axis=-1),
        jnp.concatenate([b, b - start["b"]], axis=-2),
    )
