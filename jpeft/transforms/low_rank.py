"""What LoRA and its relatives share: options by site, the factors A [in, rank] and B [rank, out], and their scale."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.site import Site, Sites, find, matches
from jpeft.transform import Context, Leaves, Params, site_key
from jpeft.transforms.linear import dropout as drop
from jpeft.transforms.linear import kaiming_uniform, positive, rate, sizes
from jpeft.tree import at

__all__ = [
    "LowRank",
    "dense_shape",
    "faster_b",
    "fresh",
    "kernel_at",
    "low_rank",
    "product",
    "rank_at",
    "scale_at",
    "where",
]


class LowRank(NamedTuple):
    """What LoRA and its relatives have in common; made by `low_rank`.

    Attributes:
      rank: r, where no pattern says otherwise.
      alpha: the scale's numerator, likewise.
      targets: pattern of the Dense layers.
      layers: only in these layers; None means all.
      dropout: on the way into A, in training.
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
    """Checks the options that LoRA and its relatives have in common; a UserError for one out of range."""
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    sizes(rank=rank, **{f"rank_pattern[{pattern!r}]": value for pattern, value in ranks.items()})
    positive(alpha=alpha, **{f"alpha_pattern[{pattern!r}]": value for pattern, value in alphas.items()})
    rate(dropout=dropout)
    return LowRank(rank, alpha, targets, layers, dropout, ranks, alphas)


def where(spec: LowRank, sites: Sites) -> tuple[Site, ...]:
    """The targets; a UserError if one is missing or if a pattern matches none of them."""
    chosen = find(sites, spec.targets, spec.layers)
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
    """The scale at a site: alpha / rank or alpha / sqrt(rank), with the rank that its leaves have."""
    rank = leaves["a"].shape[-1]
    return _first(spec.alphas, path, spec.alpha) / (math.sqrt(rank) if spec.root else rank)


def product(spec: LowRank, x: Array, a: Array, b: Array, site: Site, ctx: Context, like: Array) -> Array:
    """(x A) B in the dtype of `like`, with dropout on x in training."""
    x = drop(x, spec.dropout, None if ctx.key is None else site_key(ctx.key, site.path)).astype(like.dtype)
    return (x @ a.astype(like.dtype)) @ b.astype(like.dtype)


def faster_b(ratio: float) -> Callable[[tuple[str, ...]], float] | None:
    """`Transform.rate` for LoRA+: B learns `ratio` times as fast as the other leaves."""
    positive(learning_rate_ratio=ratio)
    return None if ratio == 1 else lambda path: ratio if path[-1] == "b" else 1.0


def dense_shape(site: Site) -> tuple[int, int]:
    """(in, out) of a site that is a Dense layer; a UserError for any other site."""
    kernel = site.params.get("kernel")
    if kernel is None or len(kernel.shape) != 2:
        raise UserError(f"site {site.path!r} is a {site.kind} without a two-dimensional kernel: name Dense layers")
    return kernel.shape


def kernel_at(params: Params | None, path: str) -> Array:
    """The kernel [in, out] of the Dense layer at a path; a UserError if there are no parameters to look into."""
    if params is None:
        raise UserError("this method starts from the base weights: give `jpeft.init` the params")
    return at(params, path)["kernel"]


def _first(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)
