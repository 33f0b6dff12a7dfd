"""A short training of a candidate, watched on held-out examples: what it gains, and in which layer it gains it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.data.batching import Batch
from jpeft.training.step import State, Tree

__all__ = ["Reached", "held_out_gradient", "held_out_loss", "trial"]


class Reached(NamedTuple):
    """Where a trial stands.

    Attributes:
      step: updates made.
      losses: [n], of the held-out examples.
      drop: like `trainable`, how much of the decrease of their mean each entry accounts for; None unless asked for.
    """

    step: int
    losses: np.ndarray
    drop: Any = None

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return float(self.losses.mean())


def held_out_loss(evaluate: Callable[[Tree, Tree, Batch], Array], loss: Callable[[Array, Array], Array]) -> Callable:
    """The function (trainable, frozen, batch) -> (sum of the losses of its rows, these losses [b]). Jit it."""

    def total(trainable: Tree, frozen: Tree, batch: Batch) -> tuple[Array, Array]:
        losses = loss(evaluate(trainable, frozen, batch), batch.labels)
        return jnp.sum(batch.weights * losses), losses

    return total


def held_out_gradient(total: Callable[[Tree, Tree, Batch], tuple[Array, Array]]) -> Callable:
    """The function (trainable, frozen, batch) -> ((sum of the losses, the losses), gradient of the sum). Jit it."""
    return jax.value_and_grad(total, has_aux=True)


@jax.jit
def _copied(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _added(sums: Tree, tree: Tree) -> Tree:
    return jax.tree.map(jnp.add, sums, tree)


def trial(
    train: Callable[..., Any],
    total: Callable[..., Any],
    state: State,
    frozen: Tree,
    batches: Iterator[Batch | tuple[Batch, ...]],
    held: Sequence[Batch],
    key: Array,
    every: int,
    attribute: bool = False,
    averaged: int | None = None,
) -> Iterator[Reached]:
    """Trains without end and looks at the held-out examples every so many steps.

    What is looked at is the mean of the trained parameters over the last `averaged` steps
    (Polyak and Juditsky 1992, *Acceleration of Stochastic Approximation by Averaging*). At a constant rate the
    parameters themselves jump about, and the more the higher the rate; a run ends on a low rate, so it does not. With
    `attribute` it is the parameters themselves: what is attributed adds up along their path.

    Along a path of training, the loss falls by the integral of -gradient . d theta. By the trapezoid rule over the
    steps, entry by entry: -(g_t + g_t+1) / 2 * (theta_t+1 - theta_t), with g the held-out gradient. The entries of a
    module sum to what it accounts for, and all together to the decrease of the loss.

    Args:
      train: a compiled training step.
      total: compiled, from `held_out_loss`; from `held_out_gradient` if `attribute`.
      state: where to start; the step takes over its buffers.
      frozen: the variables that do not train.
      batches: to train on.
      held: batches of held-out examples.
      key: the dropout key.
      every: steps between two looks.
      attribute: whether to compute `drop`, which needs the gradient at each look.
      averaged: over how many of the last steps the mean is; None for a third of `every`.

    Yields:
      Where the trial stands, after every `every` steps.
    """
    n = sum(float(np.sum(batch.weights)) for batch in held)

    def look(trainable: Tree) -> tuple[np.ndarray, Any]:
        found = [total(trainable, frozen, batch) for batch in held]
        sums = [each[0] if attribute else each for each in found]
        losses = [np.asarray(rows)[batch.weights > 0] for (_, rows), batch in zip(sums, held, strict=True)]
        if not attribute:
            return np.concatenate(losses), None
        mean = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g) / n, *(g for _, g in found))
        return np.concatenate(losses), mean

    step, drop, gradient, num_averaged = 0, None, None, averaged or -(-every // 3)
    if attribute:
        _, gradient = look(state.trainable)
        drop = jax.tree.map(np.zeros_like, gradient)
    while True:
        before = jax.tree.map(lambda x: np.array(x, np.float64), state.trainable) if attribute else None
        sums = None
        for left in reversed(range(every)):
            state, _ = train(state, frozen, next(batches), key)
            step += 1
            if left < num_averaged and not attribute:
                # A copy, since the step takes over the buffers of the state.
                sums = _copied(state.trainable) if sums is None else _added(sums, state.trainable)
        losses, later = look(state.trainable if attribute else jax.tree.map(lambda x: x / num_averaged, sums))
        if attribute:
            drop = jax.tree.map(
                lambda total, g, h, old, new: total - (g + h) / 2 * (np.asarray(new, np.float64) - old),
                drop, gradient, later, before, state.trainable,
            )  # fmt: skip
            gradient = later
        yield Reached(step, losses, drop)
