"""Optimisers for small trainable sets: AdamW as the references run it."""

import math

import optax

from jpeft.core.partition import Partition, is_matrix, map_leaves

__all__ = ["adamw", "warmup_linear"]

CLIP_NORM = 1.0  # of the gradient of all that trains


def warmup_linear(learning_rate: float, num_steps: int, warmup_ratio: float) -> optax.Schedule:
    """From 0 up to `learning_rate` in the first ceil(warmup_ratio * num_steps) steps, then linearly down to 0.

    At least one step is no warm-up: with a single one, its rate would be 0.
    """
    warmup = min(math.ceil(warmup_ratio * num_steps), max(0, num_steps - 1))
    up = optax.linear_schedule(0.0, learning_rate, warmup)
    down = optax.linear_schedule(learning_rate, 0.0, max(1, num_steps - warmup))
    return optax.join_schedules([up, down], [warmup])


def adamw(
    schedule: optax.Schedule, weight_decay: float, parts: Partition | None = None
) -> optax.GradientTransformation:
    """Clips by the global norm of what trains, then AdamW with the learning rates and the decay that the methods want.

    Args:
      schedule: the learning rate by step.
      weight_decay: decoupled decay, multiplied by the learning rate as in PyTorch.
      parts: what trains, from `jpeft.partition`. None: all leaves at one rate, and matrices decay.
    """
    mask = parts.decays if parts is not None else lambda tree: map_leaves(is_matrix, tree)
    steps = [optax.clip_by_global_norm(CLIP_NORM), optax.adamw(schedule, weight_decay=weight_decay, mask=mask)]
    return optax.chain(*steps, *([] if parts is None else [parts.scale]))
