"""Parallel adapters: a bottleneck parallel to the feed-forward (He et al. 2021, arXiv:2110.04366)."""

from collections.abc import Sequence

from jax import Array

from jpeft.core.site import Site
from jpeft.core.transform import Call, Context, Leaves, Transform
from jpeft.transforms.parts.bottleneck import Bottleneck, added, checked, init_of, like_lora
from jpeft.transforms.parts.places import find_feed_forward

__all__ = ["parallel"]


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
    """An adapter parallel to the feed-forward: ffn(x) + scale * up(f(down(x))).

    He et al. 2021, arXiv:2110.04366. Defaults are those of AdapterHub's "par_bn": relu, reduction factor 2, scale 4,
    down U(-1/sqrt(d), 1/sqrt(d)) and up 0 as in LoRA, biases 0. A fresh adapter leaves the output unchanged.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      scale: the constant factor, or the initial value of a learned one.
      layers: only in these layers; None means all.
      targets: pattern of sites with the argument (x), see `jpeft.find`.
      learned_scale: whether the factor is trained.
      gate: whether a gate scales the adapter for each example, as in UniPELT, see `jpeft.transforms.parts.gate`.
      ln_before: whether the adapter has its own LayerNorm before `down`.
      ln_after: whether it has its own LayerNorm on its output.

    Returns:
      A transform with the leaves of `houlsby`.

    Raises:
      UserError: if a size is out of range or the activation is unknown; in `init`, if a target is missing.
    """
    spec = checked(
        Bottleneck(bottleneck, reduction_factor, activation, scale, learned_scale, gate, ln_before, ln_after)
    )

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        return call(x) + added(spec, leaves, x, ctx)

    return Transform("parallel", init_of(spec, like_lora, find_feed_forward, targets, layers), wrap)
