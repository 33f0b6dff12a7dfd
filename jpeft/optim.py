"""Optimisers for small trainable sets: AdamW as the references run it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from jpeft.tree import flatten, unflatten

__all__ = ["adamw", "scale_by_path", "warmup_linear"]


def warmup_linear(learning_rate: float, num_steps: int, warmup_ratio: float) -> optax.Schedule:
    """From 0 up to `learning_rate` in the first ceil(warmup_ratio * num_steps) steps, then linearly down to 0."""
    warmup = math.ceil(warmup_ratio * num_steps)
    up = optax.linear_schedule(0.0, learning_rate, warmup)
    down = optax.linear_schedule(learning_rate, 0.0, max(1, num_steps - warmup))
    return optax.join_schedules([up, down], [warmup])


def adamw(schedule: optax.Schedule, weight_decay: float, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """Clips by the global norm of what trains, then AdamW. Vectors and scalars do not decay.

    Biases, LayerNorm parameters and vectors that start at one, such as those of (IA)3, would only be pulled away from
    where they mean "no change"; all of them have fewer than two axes.

    Args:
      schedule: the learning rate by step.
      weight_decay: decoupled decay, multiplied by the learning rate as in PyTorch.
      clip_norm: the largest global gradient norm.
    """

    def decays(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, tree)

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, weight_decay=weight_decay, mask=decays),
    )


def scale_by_path(factor: Callable[[tuple[str, ...]], float]) -> optax.GradientTransformation:
    """Multiplies the update of each leaf of a nested dict by `factor(path)`: learning rates by leaf, when put last."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return unflatten({path: u * factor(path) for path, u in flatten(updates).items()})

    return optax.stateless(scale)
