"""The loop around the step, as a generator of events: whoever drives it prints, logs, saves and times."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.data.batching import Examples, eval_batches, num_batches, train_batches
from jpeft.data.task import Data
from jpeft.training.step import State, StepMetrics, Tree

__all__ = ["Compiled", "Event", "Schedule", "Steps", "evaluate", "fit"]

Row = dict[str, Any]


class Compiled:
    """A jitted function, compiled on first use for each shape of batch.

    Attributes:
      seconds: spent tracing and compiling so far.
    """

    def __init__(self, fn: Callable[..., Any], batch_at: int, **options: Any):
        self.seconds = 0.0
        self._jitted, self._batch_at = jax.jit(fn, **options), batch_at
        self._programs: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Calls the program for the shape of the batch, which is argument number `batch_at`."""
        shape = args[self._batch_at].input_ids.shape
        if shape not in self._programs:
            start = time.perf_counter()
            self._programs[shape] = self._jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        return self._programs[shape](*args)


class Steps(NamedTuple):
    """The two functions that training calls, from `train_step` and `eval_step`."""

    train: Callable[[State, Tree, Any, Array], tuple[State, StepMetrics]]
    eval: Callable[[Tree, Tree, Any], Array]

    @classmethod
    def compiled(cls, train: Callable[..., Any], evaluate: Callable[..., Any]) -> "Steps":
        """Both as `Compiled`; the training step takes over the buffers of its state."""
        return cls(Compiled(train, 2, donate_argnums=0), Compiled(evaluate, 2))


class Schedule(NamedTuple):
    """How long to train, in what order, and with what randomness.

    Attributes:
      num_epochs: passes over the training data.
      batch_size: rows of a batch.
      seed: of the order of the rows.
      key: the dropout key.
    """

    num_epochs: int
    batch_size: int
    seed: int
    key: Array

    def num_steps(self, data: Data) -> int:
        """The number of updates in all epochs."""
        return self.num_epochs * num_batches(data.train.size, self.batch_size)


class Event(NamedTuple):
    """Where training stands after a step, or after the evaluation that ends an epoch.

    Attributes:
      state: its buffers are given up when the next event is asked for.
      epoch: counted from 1.
      step: updates made so far.
      loss: the mean loss of the batch; of the epoch's batches if `row` is there.
      loss_sum: the sum of the batch losses of the epoch under way; 0 once the epoch has its row.
      grad_norm: the global norm of the gradient before clipping; a device scalar, None in an evaluation.
      history: the rows of all finished epochs.
      row: {"epoch", "step", "train_loss" and the scores} of the epoch that just ended; None after a step.
      logits: float32 [n, num_labels] of the dev examples in that evaluation; None after a step.
    """

    state: State
    epoch: int
    step: int
    loss: float
    loss_sum: float
    grad_norm: Array | None
    history: tuple[Row, ...]
    row: Row | None = None
    logits: np.ndarray | None = None


def fit(
    steps: Steps,
    state: State,
    frozen: Tree,
    data: Data,
    schedule: Schedule,
    history: Sequence[Row] = (),
    loss_sum: float = 0.0,
) -> Iterator[Event]:
    """Trains for all epochs, evaluating after each, from where a state was taken.

    The order of the examples is a function of seed and epoch, and the dropout key one of key and step. So a run that
    resumes from an event's state, history and loss_sum ends with the same numbers as one that was not interrupted.

    Args:
      steps: what to call.
      state: the state to start from.
      frozen: the variables that do not train.
      data: the task and its examples.
      schedule: how long to train.
      history: the rows of the epochs that are finished, if this resumes.
      loss_sum: the sum of the batch losses of the epoch under way, likewise.

    Yields:
      An event after every step, and one after every evaluation.

    Raises:
      UserError: if the loss is not finite.
    """
    history, per_epoch = tuple(history), num_batches(data.train.size, schedule.batch_size)
    step = int(state.step)
    for epoch in range(step // per_epoch + 1, schedule.num_epochs + 1):
        start = step % per_epoch
        batches = train_batches(data.train, schedule.batch_size, data.buckets, schedule.seed, epoch, start)
        for batch in batches:
            step += 1
            state, measured = steps.train(state, frozen, batch, schedule.key)
            loss = float(measured.loss)
            if not np.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}: try a lower learning_rate")
            loss_sum += loss
            yield Event(state, epoch, step, loss, loss_sum, measured.grad_norm, history)
        logits = evaluate(steps.eval, state.trainable, frozen, data.dev, data.buckets)
        if not np.isfinite(logits).all():
            raise UserError(f"the model's answers are not finite after step {step}: try a lower learning_rate")
        scores = data.task.score(logits, data.dev.labels)
        row = {"epoch": epoch, "step": step, "train_loss": loss_sum / per_epoch, **scores}
        history, loss_sum = (*history, row), 0.0
        yield Event(state, epoch, step, row["train_loss"], loss_sum, None, history, row, logits)


def evaluate(
    eval_step: Callable[[Tree, Tree, Any], Array],
    trainable: Tree,
    frozen: Tree,
    examples: Examples,
    buckets: Sequence[int],
    batch_size: int = 32,
) -> np.ndarray:
    """Float32 logits [n, num_labels] of all examples, in their order."""
    rows: list[np.ndarray] = []
    order: list[np.ndarray] = []
    for batch, index in eval_batches(examples, batch_size, buckets):
        rows.append(np.asarray(eval_step(trainable, frozen, batch))[: len(index)])
        order.append(index)
    logits = np.concatenate(rows)
    restored = np.empty_like(logits)
    restored[np.concatenate(order)] = logits
    return restored
