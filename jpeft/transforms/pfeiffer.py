"""Pfeiffer adapters: one bottleneck per layer, after the feed-forward (arXiv:2005.00247)."""

from collections.abc import Sequence

from jax import Array

from jpeft.core.site import Site
from jpeft.core.transform import Call, Context, Leaves, Transform
from jpeft.transforms.parts.bottleneck import Bottleneck, added, checked, init_of, normal
from jpeft.transforms.parts.places import find_residual

__all__ = ["pfeiffer"]


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
    """One adapter per layer, after the feed-forward.

    h' = LayerNorm(h + up(f(down(x))) + residual) with x = LayerNorm(h + residual): it reads the normalised output but
    adds to the raw one, and the layer's LayerNorm is used twice. Pfeiffer et al. 2020, arXiv:2005.00247.
    Defaults are those of AdapterHub's "seq_bn": relu, reduction factor 16, kernels N(0, 0.02^2), biases 0.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`.
      scale: a constant factor on the adapter's output, or the initial value of a learned one.
      learned_scale: whether the factor is trained.
      gate: whether a gate, which also reads x, scales the adapter for each example.
      ln_before: whether the adapter has its own LayerNorm before `down`.
      ln_after: whether it has its own LayerNorm on its output.

    Returns:
      A transform with the leaves of `houlsby`, at one site per layer.

    Raises:
      UserError: if a size is out of range or the activation is unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + added(spec, leaves, call(hidden, residual), ctx), residual)

    return Transform("pfeiffer", init_of(spec, normal, find_residual, targets, layers), wrap)
