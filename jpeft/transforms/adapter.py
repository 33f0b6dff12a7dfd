"""Bottleneck adapters: Houlsby (two a layer), Pfeiffer (one a layer) and parallel.

An adapter is a residual bottleneck, h + up(f(down(h))) with down [d, b] and up [b, d]; the three differ in where it
sits. All of them stay in the model at inference: about 4 d b floating-point operations a token each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError, nearest
from jpeft.models.bert import ACTIVATIONS
from jpeft.site import Site, Sites, find
from jpeft.transform import Call, Context, Leaves, Params, Transform, init_sites
from jpeft.transforms.linear import kaiming_uniform, linear, linear_leaves, positive, sizes

__all__ = ["houlsby", "parallel", "pfeiffer"]


def houlsby(
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "swish",
    layers: Sequence[int] | None = None,
    targets: str = "attention_add_norm|ffn_add_norm",
) -> Transform:
    """An adapter after the attention projection and one after the feed-forward, before residual and LayerNorm.

    h' = LayerNorm(a(h) + residual) with a(h) = h + up(f(down(h))). Houlsby et al. 2019, arXiv:1902.00751. Defaults are
    those of AdapterHub's "double_seq_bn": swish, reduction factor 16, kernels N(0, 0.02), biases 0. The original
    (google-research/adapter-bert) has a bottleneck of 64 and GELU.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, read when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"down": {"kernel": [d, b], "bias": [b]}, "up": {"kernel": [b, d], "bias": [d]}}}.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    f = _activation(activation)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + _bottleneck(leaves, hidden, f), residual)

    return Transform("houlsby", _init(targets, layers, bottleneck, reduction_factor, _normal), wrap)


def pfeiffer(
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "relu",
    layers: Sequence[int] | None = None,
    targets: str = "ffn_add_norm",
) -> Transform:
    """One adapter a layer, after the feed-forward.

    h' = LayerNorm(h + up(f(down(x))) + residual) with x = LayerNorm(h + residual): it reads the normalised output, its
    own residual is the raw one, and the layer's LayerNorm is used twice. Pfeiffer et al. 2020, arXiv:2005.00247.
    Defaults are those of AdapterHub's "seq_bn": relu, reduction factor 16, kernels N(0, 0.02), biases 0.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, read when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`.

    Returns:
      A transform with leaves as those of `houlsby`, at one site a layer.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    f = _activation(activation)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + _bottleneck(leaves, call(hidden, residual), f), residual)

    return Transform("pfeiffer", _init(targets, layers, bottleneck, reduction_factor, _normal), wrap)


def parallel(
    bottleneck: int | None = None,
    reduction_factor: float = 2,
    activation: str = "relu",
    scale: float = 4.0,
    layers: Sequence[int] | None = None,
    targets: str = "ffn",
) -> Transform:
    """An adapter beside the feed-forward: ffn(x) + scale * up(f(down(x))).

    He et al. 2021, arXiv:2110.04366. Defaults are those of AdapterHub's "par_bn": relu, reduction factor 2, scale 4,
    down U(-1/sqrt(d), 1/sqrt(d)) and up 0 as in LoRA, biases 0. A fresh one leaves the output as it was.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, read when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      scale: the constant factor.
      layers: only in these layers; None means all.
      targets: pattern of sites with the argument (x), see `jpeft.find`.

    Returns:
      A transform with leaves as those of `houlsby`.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    f = _activation(activation)
    positive(scale=scale)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        y = call(x)
        return y + _bottleneck(leaves, x, f) * jnp.asarray(scale, y.dtype)

    return Transform("parallel", _init(targets, layers, bottleneck, reduction_factor, _lora_like), wrap)


def _bottleneck(leaves: Leaves, x: Array, f: Callable[[Array], Array]) -> Array:
    return linear(f(linear(x, leaves["down"])), leaves["up"])


def _normal(key: Array, d: int, b: int) -> tuple[Array, Array]:
    down, up = jax.random.split(key)
    return 0.02 * jax.random.normal(down, (d, b)), 0.02 * jax.random.normal(up, (b, d))


def _lora_like(key: Array, d: int, b: int) -> tuple[Array, Array]:
    return kaiming_uniform(key, (d, b)), jnp.zeros((b, d))


def _init(
    targets: str,
    layers: Sequence[int] | None,
    bottleneck: int | None,
    reduction_factor: float,
    kernels: Callable[[Array, int, int], tuple[Array, Array]],
) -> Callable[[Array, Sites, Params | None], Leaves]:
    positive(reduction_factor=reduction_factor)
    sizes(bottleneck=bottleneck)

    def make(key: Array, site: Site) -> dict[str, Any]:
        d = site.args[0].shape[-1]
        b = bottleneck or int(d / reduction_factor)
        if b < 1:
            raise UserError(f"reduction_factor {reduction_factor} leaves no bottleneck at hidden size {d}")
        down, up = kernels(key, d, b)
        return {"down": linear_leaves(down), "up": linear_leaves(up)}

    return lambda key, sites, params: init_sites(key, find(sites, targets, layers), make)


def _activation(name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is unknown: {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
