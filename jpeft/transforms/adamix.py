"""AdaMix: several adapters in place of one, sampled in training and averaged at inference (arXiv:2205.12410)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jpeft.core.leaves import fold_sites, init_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.bottleneck import Bottleneck, added, checked, fresh, normal
from jpeft.transforms.parts.linear import sizes
from jpeft.transforms.parts.places import find_residual

__all__ = ["adamix", "consistency"]


def adamix(
    experts: int = 4,
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "gelu",
    layers: Sequence[int] | None = None,
    targets: str = "ffn_add_norm",
) -> Transform:
    """h' = LayerNorm(h + up(f(down_e(h))) + residual), with one of E `down`s sampled for each layer and batch.

    Wang et al. 2022; reference: microsoft/AdaMix. `up` is shared by the experts, as in the reference's recipes. All
    experts start equal and diverge through sampling. Outside training, and after `fold`, which drops the expert axis,
    the mean of their weights is used. A batch that comes in parts (`jpeft.training.step`) samples for each of them.

    The training loss of each example includes the `consistency` of two independently sampled passes, so a training step
    costs twice as much. Inference costs as much as a single adapter, 4 d b floating-point operations per token.

    Args:
      experts: E.
      bottleneck: b; None means d / `reduction_factor`. The reference uses 48 for base models, 16 for large ones.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"down": {"kernel": [E, d, b], "bias": [E, b]}, "up": {"kernel": [b, d], "bias":
      [d]}}}, without the axis E when folded.

    Raises:
      UserError: if a size is out of range or the activation is unknown; in `init`, if a target is missing.
    """
    spec = checked(Bottleneck(bottleneck, reduction_factor, activation))
    sizes(experts=experts)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params

        def make(key: Array, site: Site) -> Leaves:
            one = fresh(spec, key, site, normal)
            return {**one, "down": jax.tree.map(lambda x: jnp.repeat(x[None], experts, axis=0), one["down"])}

        return init_sites(key, find_residual(sites, targets, layers), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        return call(hidden + added(spec, _one(leaves, ctx.key_at(site.path)), hidden, ctx), residual)

    def fold(leaves: Leaves) -> Leaves:
        return fold_sites(leaves, lambda own: _one(own, None))

    return Transform("adamix", init, wrap, fold=fold, penalty=consistency)


def consistency(logits: Array, again: Callable[[], Array]) -> Array:
    """Half the symmetric Kullback-Leibler divergence of two passes p and q, without gradients through the targets.

        (KL(stop(q) || p) + KL(stop(p) || q)) / 2

    A single logit is treated as the mean of a normal distribution of variance 1: half the squared difference. (The
    reference takes its softmax, whose divergence is always 0.)

    Args:
      logits: [b, c] of the first pass.
      again: returns the logits of the second pass.

    Returns:
      [b].
    """
    first, second = logits.astype(jnp.float32), again().astype(jnp.float32)
    divergence = _normal_divergence if logits.shape[-1] == 1 else _divergence
    return (divergence(second, first) + divergence(first, second)) / 2


def _divergence(target: Array, logits: Array) -> Array:
    target = jax.lax.stop_gradient(target)
    return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), jax.nn.log_softmax(target))


def _normal_divergence(target: Array, logits: Array) -> Array:
    return jnp.square(logits - jax.lax.stop_gradient(target))[:, 0] / 2


def _one(leaves: Leaves, key: Array | None) -> Leaves:
    """The leaves of a single adapter: a random expert, or without a key the mean of all; folded leaves unchanged."""
    down = leaves["down"]
    if down["kernel"].ndim == 2:
        return leaves
    if key is None:
        return {**leaves, "down": jax.tree.map(lambda x: x.mean(0), down)}
    expert = jax.random.randint(key, (), 0, down["bias"].shape[0])
    return {**leaves, "down": jax.tree.map(lambda x: x[expert], down)}
