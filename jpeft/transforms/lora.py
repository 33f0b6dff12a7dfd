"""Low-rank adaptation of any Dense layer (Hu et al. 2021, arXiv:2106.09685; reference: microsoft/LoRA).

rsLoRA is Kalajdzievski 2023, arXiv:2312.03732. Relatives that start from the base weights: `dora` and `pissa`.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import init_sites, merge_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.gate import gate_at, gate_value
from jpeft.transforms.parts.low_rank import (
    LowRank,
    add_to_kernel,
    dense_shape,
    faster_b,
    fresh,
    low_rank,
    product,
    scale_at,
    where,
)

__all__ = ["lora", "rslora"]


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
    rank_pattern: Mapping | None = None,
    alpha_pattern: Mapping | None = None,
    learning_rate_ratio: float = 1.0,
    gate: bool = False,
) -> Transform:
    """y = x W + (alpha / rank) x A B, with W frozen.

    A [in, rank] starts from U(-1/sqrt(in), 1/sqrt(in)), B [rank, out] from 0, so a fresh LoRA leaves the output
    bit-identical (when compiled, the last bit after `attention/output` depends on the version of XLA). The product is
    computed as (x A) B: a materialised W + A B costs more in training. Only `merge` computes it; after that inference
    costs nothing.

    With `gate`, as in UniPELT (arXiv:2110.07577), a gate replaces alpha / rank: the mean over an example's real tokens
    of sigmoid(x w + b), see `jpeft.transforms.parts.gate`. It depends on the input, so it cannot be merged, and
    inference costs 2 rank (in + out) + 2 in floating-point operations per token.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate of dropout on the input of A, in training.
      rank_pattern: {pattern: rank} for sites with a different rank, such as {"layer_[0-3]/.*": 4}. Patterns match as in
        `jpeft.find`; the first match counts.
      alpha_pattern: {pattern: alpha}, matched in the same way.
      learning_rate_ratio: B's learning rate divided by A's. LoRA+ (Hayou et al. 2024, arXiv:2402.12354) advises 16.
      gate: whether a gate replaces the scale.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out]}}; with `gate`, each path also has "gate":
      {"kernel": [in, 1], "bias": [1]}.

    Raises:
      UserError: if an option is out of range; in `init`, if a target is missing or is not a Dense layer, a pattern
        matches no target, or a gated target's input has no time axis.
    """
    if gate and alpha_pattern:
        raise UserError("a gated LoRA has no alpha: drop alpha_pattern or gate")
    spec = low_rank(rank, alpha, targets, layers, dropout, rank_pattern, alpha_pattern)
    return _lora("lora", spec, learning_rate_ratio, gate)


def rslora(
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
    dropout: float = 0.0,
    rank_pattern: Mapping | None = None,
    alpha_pattern: Mapping | None = None,
    learning_rate_ratio: float = 1.0,
) -> Transform:
    """Rank-stabilised LoRA: y = x W + (alpha / sqrt(rank)) x A B.

    The update then keeps its size as the rank grows, whereas LoRA's shrinks. All else, including the cost, is as in
    `lora`.

    Args:
      rank: r, the inner dimension.
      alpha: the scale's numerator.
      targets: pattern of the Dense layers, see `jpeft.find`.
      layers: only in these layers; None means all.
      dropout: rate of dropout on the input of A, in training.
      rank_pattern: {pattern: rank}, as in `lora`.
      alpha_pattern: {pattern: alpha}, as in `lora`.
      learning_rate_ratio: B's learning rate divided by A's.

    Returns:
      A transform with leaves {path: {"a": [in, rank], "b": [rank, out]}}.

    Raises:
      UserError: as `lora`.
    """
    spec = low_rank(rank, alpha, targets, layers, dropout, rank_pattern, alpha_pattern)
    return _lora("rslora", spec._replace(root=True), learning_rate_ratio, gate=False)


def _lora(name: str, spec: LowRank, learning_rate_ratio: float, gate: bool) -> Transform:
    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params

        def make(key: Array, site: Site) -> Leaves:
            return fresh(spec, key, site) | (gate_at(site, dense_shape(site)[0], key) if gate else {})

        return init_sites(key, where(spec, sites), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        x, *rest = args
        y = call(x, *rest)
        update = product(spec, x, leaves["a"], leaves["b"], site, ctx, y)
        if gate:  # one number for each row of the batch, where a DenseGeneral has more axes than x
            return y + update * gate_value(x, leaves["gate"], ctx.mask).reshape(-1, *(1,) * (y.ndim - 1))
        return y + update * jnp.asarray(scale_at(spec, site.path, leaves), y.dtype)

    def merge(leaves: Leaves, params: Params) -> Params:
        def merged(path: str, own: Leaves, old: Params) -> Params:
            return add_to_kernel(old, scale_at(spec, path, own) * (own["a"] @ own["b"]))

        return merge_sites(leaves, params, merged)

    def factors(path: str, own: Leaves) -> tuple[Array, Array]:
        return own["a"], scale_at(spec, path, own) * own["b"]

    method = Transform(name, init, wrap, rate=faster_b(learning_rate_ratio))
    return method if gate else method._replace(merge=merge, factors=factors)
