"""Houlsby adapters: two bottlenecks per layer, after attention and after the feed-forward (arXiv:1902.00751)."""

from collections.abc import Sequence

from jax import Array

from jpeft.core.site import Site
from jpeft.core.transform import Call, Context, Leaves, Transform
from jpeft.transforms.parts.bottleneck import Bottleneck, added, checked, init_of, normal
from jpeft.transforms.parts.places import find_residual

__all__ = ["houlsby"]


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
    those of AdapterHub's "double_seq_bn": swish, reduction factor 16, kernels N(0, 0.02^2), biases 0. The original
    (google-research/adapter-bert) has a bottleneck of 64 and GELU.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`.
      scale: a constant factor on the adapter's output, or the initial value of a learned one.
      learned_scale: whether the factor is trained.
      gate: whether a gate scales the adapter for each example, as in UniPELT, see `jpeft.transforms.parts.gate`.
      ln_before: whether the adapter has its own LayerNorm before `down`.
      ln_after: whether it has its own LayerNorm on its output.

    Returns:
      A transform with leaves {path: {"down": {"kernel": [d, b], "bias": [b]}, "up": {"kernel": [b, d], "bias": [d]}}},
      and optionally "scale" [1], "gate" {"kernel": [d, 1], "bias": [1]}, "ln_before" and "ln_after" {"scale": [d],
      "bias": [d]}.

    Raises:
      UserError: if a size is out of range or the activation is unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + added(spec, leaves, hidden, ctx), residual)

    return Transform("houlsby", init_of(spec, normal, find_residual, targets, layers), wrap)
