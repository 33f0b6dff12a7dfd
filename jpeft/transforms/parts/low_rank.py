"""Shared code of LoRA and its relatives: per-site options, the factors A [in, rank] and B [rank, out], the scale."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.site import Site, Sites, find, matches
from jpeft.core.transform import Context, Leaves, Params
from jpeft.transforms.parts.linear import dropout as drop
from jpeft.transforms.parts.linear import kaiming_uniform, positive, rate, sizes

__all__ = [
    "LowRank",
    "add_to_kernel",
    "dense_shape",
    "faster_b",
    "find_dense",
    "flat",
    "fresh",
    "low_rank",
    "product",
    "rank_at",
    "scale_at",
    "where",
]


class LowRank(NamedTuple):
    """The options that LoRA and its relatives have in common; created by `low_rank`.

    Attributes:
      rank: r, where no pattern in `ranks` matches.
      alpha: the scale's numerator, where no pattern in `alphas` matches.
      targets: pattern of the Dense layers.
      layers: only in these layers; None means all.
      dropout: rate of dropout on the input of A, in training.
      ranks: {pattern: rank}.
      alphas: {pattern: alpha}.
      root: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: int
    alpha: float
    targets: str
    layers: Sequence[int] | None
    dropout: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool = False


def low_rank(
    rank: int,
    alpha: float,
    targets: str,
    layers: Sequence[int] | None,
    dropout: float,
    rank_pattern: Mapping | None,
    alpha_pattern: Mapping | None,
) -> LowRank:
    """Checks the options that LoRA and its relatives have in common; raises a UserError if one is out of range."""
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    sizes(rank=rank, **{f"rank_pattern[{pattern!r}]": value for pattern, value in ranks.items()})
    positive(alpha=alpha, **{f"alpha_pattern[{pattern!r}]": value for pattern, value in alphas.items()})
    for pattern in (*ranks, *alphas):
        matches(pattern, "")  # is it a regular expression?
    rate(dropout=dropout)
    return LowRank(rank, alpha, targets, layers, dropout, ranks, alphas)


def where(spec: LowRank, sites: Sites) -> tuple[Site, ...]:
    """The targets; raises a UserError if one is missing or a pattern matches none of them."""
    chosen = find_dense(sites, spec.targets, spec.layers)
    paths = [site.path for site in chosen]
    for name, patterns in (("rank_pattern", spec.ranks), ("alpha_pattern", spec.alphas)):
        for pattern in patterns:
            if not any(matches(pattern, path) for path in paths):
                raise UserError(f"{name} {pattern!r} matches none of the targets: {nearest(pattern, paths)}")
    return chosen


def fresh(spec: LowRank, key: Array, site: Site) -> Leaves:
    """{"a": uniform [in, rank], "b": zeros [rank, out]} for a Dense layer."""
    size_in, size_out = dense_shape(site)
    rank = rank_at(spec, site.path)
    return {"a": kaiming_uniform(key, (size_in, rank)), "b": jnp.zeros((rank, size_out))}


def rank_at(spec: LowRank, path: str) -> int:
    """The rank at a site."""
    return _first(spec.ranks, path, spec.rank)


def scale_at(spec: LowRank, path: str, leaves: Params) -> float:
    """The scale at a site: alpha / rank or alpha / sqrt(rank), with the rank of its leaves."""
    rank = leaves["a"].shape[-1]
    return _first(spec.alphas, path, spec.alpha) / (math.sqrt(rank) if spec.root else rank)


def product(spec: LowRank, x: Array, a: Array, b: Array, site: Site, ctx: Context, like: Array) -> Array:
    """(x A) B in the dtype of `like`, with dropout on x in training."""
    x = drop(x, spec.dropout, ctx.key_at(site.path)).astype(like.dtype)
    return ((flat(x, a.shape[0]) @ a.astype(like.dtype)) @ b.astype(like.dtype)).reshape(like.shape)


def faster_b(ratio: float) -> Callable[[tuple[str, ...]], float] | None:
    """`Transform.rate` for LoRA+: B learns `ratio` times as fast as the other leaves."""
    positive(learning_rate_ratio=ratio)
    return None if ratio == 1 else lambda path: ratio if path[-1] == "b" else 1.0


def find_dense(sites: Sites, targets: str, layers: Sequence[int] | None) -> tuple[Site, ...]:
    """The Dense layers, including `nn.DenseGeneral` over its last axes, that match a pattern; see `jpeft.find`."""
    return find(sites, targets, layers, lambda site: _features(site) is not None, "Dense layers")


def dense_shape(site: Site) -> tuple[int, int]:
    """(in, out) of a Dense layer; for a DenseGeneral, the products over its input and output axes."""
    shape = _features(site)
    assert shape is not None, site
    return shape


def _features(site: Site) -> tuple[int, int] | None:
    """(in, out) of a site whose kernel maps the last axes of its argument to those of its output, or None."""
    kernel, x, out = site.params.get("kernel"), site.args[0] if site.args else None, site.out
    if not all(isinstance(array, jax.ShapeDtypeStruct) for array in (kernel, x, out)) or " over axes" in site.kind:
        return None
    if site.kind == "Einsum":  # whose kernel may be turned, which shapes do not tell
        return None
    assert kernel is not None  # for the type checker
    assert x is not None
    # The kernel contracts the last n axes of x; the output has the kernel's other axes in their place.
    n, odd = divmod(len(x.shape) - len(out.shape) + len(kernel.shape), 2)
    lead = len(x.shape) - n
    if odd or not 0 < n < len(kernel.shape) or lead < 0 or x.shape[:lead] + kernel.shape[n:] != out.shape:
        return None
    return (math.prod(kernel.shape[:n]), math.prod(kernel.shape[n:])) if x.shape[lead:] == kernel.shape[:n] else None


def flat(x: Array, features: int) -> Array:
    """x with its last axes merged into one of this many features, as a DenseGeneral may have several."""
    size, axes = 1, 0
    while size < features and axes < x.ndim:
        axes += 1
        size *= x.shape[-axes]
    return x if axes == 1 else x.reshape(*x.shape[: x.ndim - axes], features)


def add_to_kernel(own: Params, update: Array) -> Params:
    """A layer's parameters with [in, out] added to its kernel."""
    return {**own, "kernel": own["kernel"] + update.reshape(own["kernel"].shape)}


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)
