"""One training step and one evaluation step, as pure functions of three pytrees.

    frozen      what never changes: the base model less what was selected to train, and leaves that are fixed
    trainable   the rest: the head, selected base leaves, the leaves of the transform
    opt_state   the optimiser's, for `trainable` alone

The first two are {"params": ..., "peft": ...}, and their union is the variables of the model.

`frozen` is an argument, not a captured constant, and gradients are taken with respect to `trainable` alone: XLA then
drops the backward pass of everything that does not train.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from jpeft.core.hook import apply
from jpeft.core.partition import penalty
from jpeft.core.transform import Chain, Transform
from jpeft.core.tree import union
from jpeft.data.batching import Batch
from jpeft.data.kinds import over_words
from jpeft.data.task import example_losses

__all__ = [
    "State",
    "StepMetrics",
    "Tree",
    "eval_step",
    "forward",
    "init_state",
    "single_logits",
    "single_loss",
    "stack",
    "together",
    "train_step",
    "unstack",
]

Tree = dict[str, Any]
Loss = Callable[[Array, Array], Array]  # (logits [b, num_labels], labels [b]) -> [b]


class State(NamedTuple):
    """What training changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      trainable: {"params": ..., "peft": ...}.
      opt_state: the optimiser's state.
    """

    step: Array
    trainable: Tree
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Float32 scalars of one step: mean loss of the batch, global gradient norm before clipping."""

    loss: Array
    grad_norm: Array


def init_state(trainable: Tree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, of copies: a step takes over their buffers, and leaves may be the base's own."""
    trainable = jax.tree.map(jnp.array, trainable)
    return State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def forward(
    model: nn.Module,
    transform: Transform | Chain,
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    key: Array | None = None,
) -> Array:
    """Float32 logits [b, num_labels] of a batch; dropout is on if there is a key."""
    begin = {} if batch.hidden is None else {"hidden": batch.hidden.states, "layer": batch.hidden.layer}
    logits, _ = apply(
        model,
        transform,
        union(frozen, trainable),
        batch.input_ids,
        batch.attention_mask,
        batch.token_type_ids,
        train=key is not None,
        mask=batch.attention_mask,
        rngs=None if key is None else {"dropout": key},
        **begin,
    )
    return logits


def train_step(
    model: nn.Module,
    transform: Transform | Chain,
    optimizer: optax.GradientTransformation,
    example_loss: Loss = example_losses,
) -> Callable[[State, Tree, Batch | tuple[Batch, ...], Array], tuple[State, StepMetrics]]:
    """The function (state, frozen, batch, key) -> (state, metrics); jit it, and donate the state.

    A batch may come in parts of different padded lengths, as from `train_batches`: the loss is the mean over all rows.
    `example_loss` is `Task.loss`. The dropout key of a step is `key` folded with the step's number, so a resumed run
    draws what it would have drawn, and that of a part is folded with the part's number, too.
    """

    def step(state: State, frozen: Tree, batch: Batch | tuple[Batch, ...], key: Array) -> tuple[State, StepMetrics]:
        key = jax.random.fold_in(key, state.step)
        parts: tuple[Batch, ...] = (batch,) if isinstance(batch, Batch) else batch

        def losses(trainable: Tree, part: Batch, key: Array) -> Array:
            def again() -> Array:
                return forward(model, transform, trainable, frozen, part, jax.random.fold_in(key, 1))

            logits = forward(model, transform, trainable, frozen, part, key)
            more = penalty(transform, logits, again)
            own = over_words(more, part.labels) if jnp.ndim(more) > 1 else more
            return example_loss(logits, part.labels) + own

        def loss(trainable: Tree) -> Array:
            found = [losses(trainable, part, jax.random.fold_in(key, i)) for i, part in enumerate(parts)]
            return jnp.average(jnp.concatenate(found), weights=jnp.concatenate([part.weights for part in parts]))

        value, grads = jax.value_and_grad(loss)(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        return State(state.step + 1, trainable, opt_state), StepMetrics(value, optax.tree.norm(grads))

    return step


def eval_step(model: nn.Module, transform: Transform | Chain) -> Callable[[Tree, Tree, Batch], Array]:
    """The function (trainable, frozen, batch) -> logits, without dropout."""
    return lambda trainable, frozen, batch: forward(model, transform, trainable, frozen, batch)


def together(fn: Callable[..., Any], batch_axis: int | None) -> Callable[..., Any]:
    """A step of several runs at once, from that of one: `jax.vmap` over all but the base model, which they share.

    Args:
      fn: from `train_step` or `eval_step`.
      batch_axis: 0 if each run has batches of its own, as in training; None if all have the same, as in evaluation.

    Returns:
      The same function of a state (or trainable variables) stacked over runs, of frozen variables of which the leaves,
      "peft", are stacked and the base, "params", is not, of batches, and of stacked keys, if `fn` takes one.
    """

    def run(first: Any, frozen: Tree, batch: Any, *keys: Array) -> Any:
        axes = (0, {"params": None, "peft": 0}, batch_axis, *(0 for _ in keys))
        return jax.vmap(fn, axes)(first, frozen, batch, *keys)

    return run


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, i: int) -> Any:
    """The tree number `i` of those that were stacked."""
    return jax.tree.map(lambda x: x[i], tree)


def single_loss(
    model: nn.Module, transform: Transform | Chain, example_loss: Loss = example_losses
) -> Callable[[Tree, Batch, Tree], Array]:
    """The function (part, example, rest) -> loss of one example without a batch axis, for `jpeft.fisher`.

    `part` and `rest` together are the variables, as `trainable` and `frozen` are in training.
    """
    logits = single_logits(model, transform)
    return lambda part, example, rest: example_loss(logits(part, example, rest)[None], example.labels[None])[0]


def single_logits(model: nn.Module, transform: Transform | Chain) -> Callable[[Tree, Batch, Tree], Array]:
    """The function (part, example, rest) -> logits [num_labels] of one example, otherwise as `single_loss`."""
    return lambda part, example, rest: forward(model, transform, part, rest, jax.tree.map(_row, example))[0]


def _row(x: Array) -> Array:
    return x[None]
