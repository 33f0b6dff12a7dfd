"""The gate of UniPELT (Mao et al. 2021, arXiv:2110.07577): it scales a module's effect for each example.

    gate = mean over the real tokens of sigmoid(x w + b)           x [b, t, d], w [d, 1], b [1]

One number per example. The peers (morningmoni/UniPELT, AdapterHub's `adapters`) also average over the padding, which
makes a row's logits depend on the rest of its batch; here they do not.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.site import Site
from jpeft.core.transform import Leaves, site_key

__all__ = ["gate_at", "gate_leaves", "gate_value"]


def gate_leaves(d: int, key: Array) -> Leaves:
    """A gate near one half: w from N(0, 0.02^2) and b = 0, as in the bottlenecks of `adapters`.

    (Its LoRA samples b, and its prefix w too, from U(-1/sqrt(d), 1/sqrt(d)); here all modules start alike.)

    Args:
      d: width of the gate's input.
      key: a PRNG key.

    Returns:
      {"kernel": [d, 1], "bias": [1]}, float32.
    """
    return {"kernel": 0.02 * jax.random.normal(key, (d, 1)), "bias": jnp.zeros(1)}


def gate_at(site: Site, d: int, key: Array) -> Leaves:
    """{"gate": a fresh gate of width d} for a module at a site; raises a UserError if its input has no time axis."""
    if len(site.args[0].shape) != 3:
        raise UserError(f"site {site.path!r} reads {site.args[0].shape}: a gate needs [rows, tokens, features]")
    return {"gate": gate_leaves(d, site_key(key, "gate"))}


def gate_value(x: Array, leaves: Leaves, mask: Array | None) -> Array:
    """The value of the gate.

    Args:
      x: [b, t, d].
      leaves: as from `gate_leaves`.
      mask: [b, t], above 0 for real tokens; None means that all are real. If x is longer than the mask, prompts were
        prepended: the surplus leading tokens count as real.

    Returns:
      [b, 1, 1] in the dtype of x; 0 for a row without a real token.
    """
    kernel, bias = leaves["kernel"].astype(x.dtype), leaves["bias"].astype(x.dtype)
    if mask is not None and mask.ndim != 2:
        raise UserError(f"a gate needs a mask [rows, tokens], got {mask.shape}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    opened = jax.nn.sigmoid(x @ kernel + bias.reshape(1, 1, 1)).astype(wide)
    if mask is None:
        return opened.mean(1, keepdims=True).astype(x.dtype)
    real = jnp.pad(mask > 0, ((0, 0), (x.shape[1] - mask.shape[1], 0)), constant_values=True)[..., None]
    count = jnp.maximum(real.sum(1, keepdims=True), 1)
    return (jnp.where(real, opened, 0.0).sum(1, keepdims=True) / count).astype(x.dtype)
