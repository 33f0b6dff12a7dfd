"""Bottleneck adapters: Houlsby (two a layer), Pfeiffer (one a layer) and parallel.

An adapter is a residual bottleneck, h + up(f(down(h))) with down [d, b] and up [b, d], see
`jpeft.transforms.bottleneck`; the three differ in where it sits. All of them stay in the model at inference: about
4 d b floating-point operations a token each.
"""

from collections.abc import Sequence

from jax import Array

from jpeft.site import Site
from jpeft.transform import Call, Context, Leaves, Transform
from jpeft.transforms.bottleneck import Bottleneck, added, checked, init_of, like_lora, normal

__all__ = ["houlsby", "parallel", "pfeiffer"]


def houlsby(
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "swish",
    layers: Sequence[int] | None = None,
    targets: str = "attention_add_norm|ffn_add_norm",
    scale: float = 1.0,
    learned_scale: bool = False,
    gate: bool = False,
    ln_before: bool = False,
    ln_after: bool = False,
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
      scale: a constant factor on what the adapter adds, or where a learned one starts.
      learned_scale: whether the factor is trained.
      gate: whether a gate opens the adapter for each example, as in UniPELT, see `jpeft.transforms.gate`.
      ln_before: whether the adapter has a LayerNorm of its own before `down`.
      ln_after: whether it has one on what it adds.

    Returns:
      A transform with leaves {path: {"down": {"kernel": [d, b], "bias": [b]}, "up": {"kernel": [b, d], "bias": [d]}}},
      and as chosen "scale" [1], "gate" {"kernel": [d, 1], "bias": [1]}, "ln_before" and "ln_after" {"scale": [d],
      "bias": [d]}.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + added(spec, leaves, hidden, ctx), residual)

    return Transform("houlsby", init_of(spec, normal, targets, layers), wrap)


def pfeiffer(
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "relu",
    layers: Sequence[int] | None = None,
    targets: str = "ffn_add_norm",
    scale: float = 1.0,
    learned_scale: bool = False,
    gate: bool = False,
    ln_before: bool = False,
    ln_after: bool = False,
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
      scale: as in `houlsby`, and so are the rest.
      learned_scale: whether the factor is trained.
      gate: whether a gate opens the adapter for each example; it reads x, too.
      ln_before: whether the adapter has a LayerNorm of its own before `down`.
      ln_after: whether it has one on what it adds.

    Returns:
      A transform with leaves as those of `houlsby`, at one site a layer.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + added(spec, leaves, call(hidden, residual), ctx), residual)

    return Transform("pfeiffer", init_of(spec, normal, targets, layers), wrap)


def parallel(
    bottleneck: int | None = None,
    reduction_factor: float = 2,
    activation: str = "relu",
    scale: float = 4.0,
    layers: Sequence[int] | None = None,
    targets: str = "ffn",
    learned_scale: bool = False,
    gate: bool = False,
    ln_before: bool = False,
    ln_after: bool = False,
) -> Transform:
    """An adapter beside the feed-forward: ffn(x) + scale * up(f(down(x))).

    He et al. 2021, arXiv:2110.04366. Defaults are those of AdapterHub's "par_bn": relu, reduction factor 2, scale 4,
    down U(-1/sqrt(d), 1/sqrt(d)) and up 0 as in LoRA, biases 0. A fresh one leaves the output as it was.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, read when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      scale: the constant factor, or where a learned one starts.
      layers: only in these layers; None means all.
      targets: pattern of sites with the argument (x), see `jpeft.find`.
      learned_scale: whether the factor is trained.
      gate: whether a gate opens the adapter for each example, as in UniPELT, see `jpeft.transforms.gate`.
      ln_before: whether the adapter has a LayerNorm of its own before `down`.
      ln_after: whether it has one on what it adds.

    Returns:
      A transform with leaves as those of `houlsby`.

    Raises:
      UserError: if a size is out of range or the activation unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        return call(x) + added(spec, leaves, x, ctx)

    return Transform("parallel", init_of(spec, like_lora, targets, layers), wrap)
