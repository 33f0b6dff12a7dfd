"""The loop around the step, as a generator of events: whoever drives it prints, logs, saves and times.

The host runs ahead of the device: it hands over the next steps before the last ones are done, and looks at losses a few
times a second only.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.data.batching import Batch, Examples, eval_batches, num_batches, train_batches
from jpeft.data.task import Data
from jpeft.training.step import State, StepMetrics, Tree

__all__ = ["EVAL_BATCH", "Compiled", "Event", "Schedule", "Steps", "evaluate", "fit", "prepare"]

EVAL_BATCH = 32  # rows
AHEAD = 2  # steps that the host hands over before it waits for an earlier one: enough to hide its own work

Row = dict[str, Any]


class Compiled:
    """A jitted function with one program for each shape of batch, compiled ahead or on first use.

    Attributes:
      seconds: spent tracing and compiling so far.
    """

    def __init__(self, fn: Callable[..., Any], batch_at: int, **options: Any):
        self.seconds = 0.0
        self._jitted, self._batch_at = jax.jit(fn, **options), batch_at
        self._programs: dict[tuple[int, ...], Callable[..., Any]] = {}

    def prepare(self, calls: Sequence[tuple[Any, ...]]) -> None:
        """Compiles a program for each of these arguments, which may be `jax.ShapeDtypeStruct`s, in parallel threads."""
        start = time.perf_counter()
        missing = {args[self._batch_at].input_ids.shape: args for args in calls}
        todo = {shape: args for shape, args in missing.items() if shape not in self._programs}
        with ThreadPoolExecutor(max(1, min(len(todo), os.cpu_count() or 1))) as threads:
            self._programs |= dict(zip(todo, threads.map(self._compile, todo.values()), strict=True))
        self.seconds += time.perf_counter() - start

    def __call__(self, *args: Any) -> Any:
        """Calls the program for the shape of the batch, which is argument number `batch_at`."""
        shape = args[self._batch_at].input_ids.shape
        if shape not in self._programs:
            start = time.perf_counter()
            self._programs[shape] = self._compile(args)
            self.seconds += time.perf_counter() - start
        return self._programs[shape](*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        return self._jitted.lower(*args).compile()


class Steps(NamedTuple):
    """The two functions that training calls, from `train_step` and `eval_step`."""

    train: Callable[[State, Tree, Any, Array], tuple[State, StepMetrics]]
    eval: Callable[[Tree, Tree, Any], Array]

    @classmethod
    def compiled(cls, train: Callable[..., Any], evaluate: Callable[..., Any]) -> "Steps":
        """Both as `Compiled`; the training step takes over the buffers of its state."""
        return cls(Compiled(train, 2, donate_argnums=0), Compiled(evaluate, 2))


def prepare(steps: Steps, state: State, frozen: Tree, data: Data, schedule: "Schedule") -> None:
    """Compiles the programs of steps that are `Compiled` for all padded lengths, ahead of the first step."""
    labels = data.train.labels.dtype
    train = [_shape(schedule.batch_size, length, labels) for length in _used(data.train, data.buckets)]
    dev = [_shape(EVAL_BATCH, length, labels) for length in _used(data.dev, data.eval_buckets)]
    if isinstance(steps.train, Compiled):
        steps.train.prepare([(state, frozen, batch, schedule.key) for batch in train])
    if isinstance(steps.eval, Compiled):
        steps.eval.prepare([(state.trainable, frozen, batch) for batch in dev])


def _used(examples: Examples, buckets: Sequence[int]) -> list[int]:
    return sorted({min(b for b in buckets if b >= n) for n in set(examples.lengths.tolist())})


def _shape(rows: int, length: int, labels: Any) -> Batch:
    ids = jax.ShapeDtypeStruct((rows, length), np.int32)
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct((rows,), labels), jax.ShapeDtypeStruct((rows,), np.float32))


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
    """Where training stands after some steps, or after the evaluation that ends an epoch.

    Attributes:
      state: its buffers are given up when the next event is asked for.
      epoch: counted from 1.
      step: updates made so far.
      losses: the mean losses of the batches since the last event; () in an evaluation.
      grad_norms: the global norms of their gradients before clipping.
      loss_sum: the sum of the batch losses of the epoch under way; 0 once the epoch has its row.
      history: the rows of all finished epochs.
      row: {"epoch", "step", "train_loss" and the scores} of the epoch that just ended; None after steps.
      logits: float32 [n, num_labels] of the dev examples in that evaluation; None after steps.
    """

    state: State
    epoch: int
    step: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    loss_sum: float
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
    every: float = 0.2,
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
      every: seconds between events. Only then does the host wait for the device; 0 gives an event after every step.

    Yields:
      An event now and then, one after the last step of an epoch, and one after its evaluation.

    Raises:
      UserError: if a loss, or an answer in an evaluation, is not finite.
    """
    history, per_epoch = tuple(history), num_batches(data.train.size, schedule.batch_size)
    step = int(state.step)
    for epoch in range(step // per_epoch + 1, schedule.num_epochs + 1):
        start = step % per_epoch
        pending: list[StepMetrics] = []
        due = time.monotonic() + every
        for batch in train_batches(data.train, schedule.batch_size, data.buckets, schedule.seed, epoch, start):
            state, measured = steps.train(state, frozen, batch, schedule.key)
            step += 1
            pending.append(measured)
            if len(pending) > AHEAD:
                jax.block_until_ready(pending[-1 - AHEAD].loss)
            if time.monotonic() < due and step % per_epoch:
                continue
            losses, norms = _finite(pending, step)
            for loss in losses:  # one by one: the sum must not depend on when events come
                loss_sum += loss
            yield Event(state, epoch, step, losses, norms, loss_sum, history)
            pending, due = [], time.monotonic() + every
        logits = evaluate(steps.eval, state.trainable, frozen, data.dev, data.eval_buckets)
        if not np.isfinite(logits).all():
            raise UserError(f"the model's answers are not finite after step {step}: try a lower learning_rate")
        scores = data.task.score(logits, data.dev.labels)
        row = {"epoch": epoch, "step": step, "train_loss": loss_sum / per_epoch, **scores}
        history, loss_sum = (*history, row), 0.0
        yield Event(state, epoch, step, (), (), loss_sum, history, row, logits)


def _finite(pending: Sequence[StepMetrics], step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The losses and gradient norms of the steps up to `step`, on the host."""
    found = jax.device_get(pending)
    losses, norms = (tuple(float(getattr(each, name)) for each in found) for name in StepMetrics._fields)
    for i, loss in enumerate(losses):
        if not np.isfinite(loss):
            at = step - len(losses) + 1 + i
            raise UserError(f"the loss is {loss} at step {at}: try a lower learning_rate")
    return losses, norms


def evaluate(
    eval_step: Callable[[Tree, Tree, Any], Array],
    trainable: Tree,
    frozen: Tree,
    examples: Examples,
    buckets: Sequence[int],
    batch_size: int = EVAL_BATCH,
) -> np.ndarray:
    """Float32 logits [n, num_labels] of all examples, in their order."""
    found: list[Any] = []
    order: list[np.ndarray] = []
    for batch, index in eval_batches(examples, batch_size, buckets):
        found.append(eval_step(trainable, frozen, batch))
        order.append(index)
        if len(found) > AHEAD:
            jax.block_until_ready(found[-1 - AHEAD])
    rows = [x[: len(index)] for x, index in zip(jax.device_get(found), order, strict=True)]
    logits = np.concatenate(rows)
    restored = np.empty_like(logits)
    restored[np.concatenate(order)] = logits
    return restored
