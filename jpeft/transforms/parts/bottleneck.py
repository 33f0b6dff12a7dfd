"""The bottleneck of all adapters; each adapter's own module decides where to put it.

    added = ln_after(scale * gate * up(f(down(ln_before(x)))))      down [d, b], up [b, d]

Scale, gate and the two LayerNorms are optional; they are placed as in AdapterHub's `adapters`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.leaves import init_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Context, Leaves, Params
from jpeft.models.bert import ACTIVATIONS
from jpeft.transforms.parts.gate import gate_at, gate_value
from jpeft.transforms.parts.linear import kaiming_uniform, layer_norm, linear, linear_leaves, positive, sizes

__all__ = ["Bottleneck", "added", "checked", "fresh", "init_of", "like_lora", "normal"]

EPSILON = 1e-5  # of the LayerNorms, as in PyTorch
Kernels = Callable[[Array, int, int], tuple[Array, Array]]
Find = Callable[[Sites, str, Sequence[int] | None], tuple[Site, ...]]


class Bottleneck(NamedTuple):
    """The options that adapters have in common; checked by `checked`.

    Attributes:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      scale: the constant factor, or the initial value of a learned one.
      learned_scale: whether the factor is a leaf, "scale" [1].
      gate: whether there is a gate as in UniPELT, see `jpeft.transforms.parts.gate`; it reads x.
      ln_before: whether a LayerNorm comes before `down`.
      ln_after: whether a LayerNorm comes last; a fresh adapter then changes the output.
    """

    bottleneck: int | None
    reduction_factor: float
    activation: str
    scale: float = 1.0
    learned_scale: bool = False
    gate: bool = False
    ln_before: bool = False
    ln_after: bool = False


def checked(spec: Bottleneck) -> Bottleneck:
    """Returns the options; raises a UserError if one is out of range."""
    positive(reduction_factor=spec.reduction_factor, scale=spec.scale)
    sizes(bottleneck=spec.bottleneck)
    if spec.activation not in ACTIVATIONS:
        raise UserError(f"activation {spec.activation!r} is unknown: {nearest(spec.activation, ACTIVATIONS)}")
    return spec


def normal(key: Array, d: int, b: int) -> tuple[Array, Array]:
    """Both kernels from N(0, 0.02^2)."""
    down, up = jax.random.split(key)
    return 0.02 * jax.random.normal(down, (d, b)), 0.02 * jax.random.normal(up, (b, d))


def like_lora(key: Array, d: int, b: int) -> tuple[Array, Array]:
    """`down` from U(-1/sqrt(d), 1/sqrt(d)), `up` 0."""
    return kaiming_uniform(key, (d, b)), jnp.zeros((b, d))


def fresh(spec: Bottleneck, key: Array, site: Site, kernels: Kernels) -> Leaves:
    """The leaves of one adapter at a site whose first argument is [..., d].

    Raises:
      UserError: if the bottleneck would be empty at this width, or a gate has no time axis to average over.
    """
    d = site.args[0].shape[-1]
    b = spec.bottleneck or int(d / spec.reduction_factor)
    if b < 1:
        raise UserError(f"reduction_factor {spec.reduction_factor} leaves no bottleneck at hidden size {d}")
    down, up = kernels(key, d, b)
    leaves: Leaves = {"down": linear_leaves(down), "up": linear_leaves(up)}
    if spec.learned_scale:
        leaves["scale"] = jnp.full(1, float(spec.scale))
    if spec.gate:
        leaves |= gate_at(site, d, key)
    for name, wanted in (("ln_before", spec.ln_before), ("ln_after", spec.ln_after)):
        if wanted:
            leaves[name] = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
    return leaves


def init_of(
    spec: Bottleneck, kernels: Kernels, find: Find, targets: str, layers: Sequence[int] | None
) -> Callable[[Array, Sites, Params | None], Leaves]:
    """The `init` of a transform with one adapter at each target that `find` returns."""
    return lambda key, sites, params: init_sites(
        key, find(sites, targets, layers), lambda key, site: fresh(spec, key, site, kernels)
    )


def added(spec: Bottleneck, leaves: Leaves, x: Array, ctx: Context) -> Array:
    """The adapter's output, [..., d] in the dtype of x, to be added by the caller."""
    inner = layer_norm(x, leaves["ln_before"], EPSILON) if spec.ln_before else x
    out = linear(ACTIVATIONS[spec.activation](linear(inner, leaves["down"])), leaves["up"])
    if spec.learned_scale:
        out = out * leaves["scale"].astype(x.dtype).reshape((1,) * x.ndim)
    elif spec.scale != 1.0:
        out = out * jnp.asarray(spec.scale, x.dtype)
    if spec.gate:
        out = out * gate_value(x, leaves["gate"], ctx.mask)
    return layer_norm(out, leaves["ln_after"], EPSILON) if spec.ln_after else out
