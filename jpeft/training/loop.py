"""The loop around the step, as a generator of events: whoever drives it prints, logs, saves and times.

The host runs ahead of the device: it hands over the next steps before the last ones are done, and looks at losses a few
times a second only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.data.batching import Examples, eval_batches, num_batches, train_batches
from jpeft.data.task import Data
from jpeft.training.compiled import EVAL_BATCH, Steps
from jpeft.training.step import State, StepMetrics, Tree, unstack

__all__ = ["Event", "Row", "Schedule", "evaluate", "fit", "fit_together"]

AHEAD = 2  # steps that the host hands over before it waits for an earlier one: enough to hide its own work

Row = dict[str, Any]


class Schedule(NamedTuple):
    """How long to train, in what order, and with what randomness.

    Attributes:
      num_epochs: passes over the training data.
      seed: of the order of the rows.
      key: the dropout key.
    """

    num_epochs: int
    seed: int
    key: Array

    def num_steps(self, data: Data) -> int:
        """The number of updates in all epochs."""
        return self.num_epochs * num_batches(data.train.size, data.batch_size)


class Event(NamedTuple):
    """Where a run stands after some steps, or after the evaluation that ends an epoch.

    Attributes:
      states: of this run, or of all that train together; its buffers are given up when the next event is asked for.
      run: which of them this one is; None if it is alone.
      epoch: counted from 1.
      step: updates made so far.
      losses: the mean losses of the batches since the last event; () in an evaluation.
      grad_norms: the global norms of their gradients before clipping.
      loss_sum: the sum of the batch losses of the epoch under way; 0 once the epoch has its row.
      history: the rows of all finished epochs.
      row: {"epoch", "step", "train_loss" and the scores} of the epoch that just ended; None after steps.
      logits: of the dev examples in that evaluation, as `evaluate` gives them; None after steps.
    """

    states: State
    run: int | None
    epoch: int
    step: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    loss_sum: float
    history: tuple[Row, ...]
    row: Row | None = None
    logits: np.ndarray | None = None

    @property
    def state(self) -> State:
        """The state of this run alone."""
        return self.states if self.run is None else unstack(self.states, self.run)


def fit(
    steps: Steps,
    state: State,
    frozen: Tree,
    data: Data,
    schedule: Schedule,
    history: Sequence[Row] = (),
    loss_sum: float = 0.0,
    every: float = 0.2,
    every_steps: int = 0,
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
      every_steps: if not 0, steps between events instead, which several processes count alike.

    Yields:
      An event now and then, one after the last step of an epoch, and one after its evaluation.

    Raises:
      UserError: if a loss, or an answer in an evaluation, is not finite.
    """
    for (event,) in fit_together(steps, state, frozen, data, [schedule], [history], [loss_sum], every, every_steps):
        yield event


def fit_together(
    steps: Steps,
    states: State,
    frozen: Tree,
    data: Data,
    schedules: Sequence[Schedule],
    histories: Sequence[Sequence[Row]],
    loss_sums: Sequence[float],
    every: float = 0.2,
    every_steps: int = 0,
) -> Iterator[tuple[Event, ...]]:
    """Trains several runs step by step together, each as `fit` would alone.

    Args:
      steps: see `fit`; of several runs, from `step.together`.
      states: of several runs, stacked along a leading axis, all at one step.
      frozen: see `fit`, and `step.together`.
      data: see `fit`; one for all.
      schedules: one for each run; they differ in seed and key.
      histories: of each run.
      loss_sums: of each run.
      every: see `fit`.
      every_steps: see `fit`.

    Yields:
      Events as `fit`, one for each run.

    Raises:
      UserError: see `fit`.
    """
    first, runs = schedules[0], [None] if len(schedules) == 1 else list(range(len(schedules)))
    key = first.key if runs == [None] else jnp.stack([schedule.key for schedule in schedules])
    histories, sums = [tuple(history) for history in histories], list(loss_sums)
    per_epoch = num_batches(data.train.size, data.batch_size)
    step = int(np.max(states.step))
    for epoch in range(step // per_epoch + 1, first.num_epochs + 1):
        pending: list[StepMetrics] = []
        due = time.monotonic() + every
        orders = [
            train_batches(data.train, data.layouts, schedule.seed, epoch, step % per_epoch, steps.devices, data.grouped)
            for schedule in schedules
        ]
        for batches in zip(*orders, strict=True):
            batch = batches[0] if runs == [None] else jax.tree.map(lambda *rows: np.stack(rows), *batches)
            states, measured = steps.train(states, frozen, batch, key)
            step += 1
            pending.append(measured)
            if len(pending) > AHEAD:
                jax.block_until_ready(pending[-1 - AHEAD].loss)
            wait = step % every_steps != 0 if every_steps else time.monotonic() < due
            if wait and step % per_epoch:
                continue
            losses, norms = _fetched(pending, step, schedules)
            for i, own in enumerate(losses):
                for loss in own:  # one by one: the sum must not depend on when events come
                    sums[i] += loss
            yield tuple(
                Event(states, run, epoch, step, losses[i], norms[i], sums[i], histories[i])
                for i, run in enumerate(runs)
            )
            pending, due = [], time.monotonic() + every
        found = evaluate(steps.eval, states.trainable, frozen, data.dev, data.eval_buckets, steps.eval_rows)
        if not np.isfinite(found).all():
            raise UserError(f"the model's answers are not finite after step {step}: try a lower learning_rate")
        logits = [found] if runs == [None] else list(found)
        rows: list[Row] = [
            {"epoch": epoch, "step": step, "train_loss": loss_sum / per_epoch, **data.task.scores(own, data.dev.labels)}
            for loss_sum, own in zip(sums, logits, strict=True)
        ]
        histories = [(*history, row) for history, row in zip(histories, rows, strict=True)]
        sums = [0.0] * len(runs)
        yield tuple(
            Event(states, run, epoch, step, (), (), 0.0, histories[i], rows[i], logits[i]) for i, run in enumerate(runs)
        )


def _fetched(
    pending: Sequence[StepMetrics], step: int, schedules: Sequence[Schedule]
) -> list[tuple[tuple[float, ...], ...]]:
    """The losses and the gradient norms of the steps up to `step`, on the host: by run, by step."""
    found = jax.device_get(pending)
    losses, norms = (
        np.array([getattr(each, name) for each in found], np.float64).reshape(len(found), -1).T
        for name in StepMetrics._fields
    )
    for run, i in np.argwhere(~np.isfinite(losses)):
        of = f" of seed {schedules[run].seed}" if len(schedules) > 1 else ""
        at = step - len(found) + 1 + i
        raise UserError(f"the loss is {losses[run, i]} at step {at}{of}: try a lower learning_rate")
    return [tuple(map(tuple, values.tolist())) for values in (losses, norms)]


def evaluate(
    eval_step: Callable[[Tree, Tree, Any], Array],
    trainable: Tree,
    frozen: Tree,
    examples: Examples,
    buckets: Sequence[int],
    batch_size: int = EVAL_BATCH,
) -> np.ndarray:
    """Float32 logits [n, num_labels] of all examples, in their order; [runs, n, num_labels] of several runs.

    Where labels are by token, those of the labelled tokens alone, [m, num_labels], row after row.
    """
    found: list[Any] = []
    order: list[np.ndarray] = []
    for batch, index in eval_batches(examples, batch_size, buckets):
        found.append(eval_step(trainable, frozen, batch))
        order.append(index)
        if len(found) > AHEAD:
            jax.block_until_ready(found[-1 - AHEAD])
    rows = [_of_rows(x, examples, index) for x, index in zip(jax.device_get(found), order, strict=True)]
    logits, index = np.concatenate(rows, axis=-2), np.concatenate(order)
    if examples.unlabelled is not None:  # from the order of the batches to that of the rows, words of a row together
        index = np.argsort(np.repeat(index, _words(examples)[index]), kind="stable").argsort()
    restored = np.empty_like(logits)
    restored[..., index, :] = logits
    return restored


def _of_rows(logits: np.ndarray, examples: Examples, rows: np.ndarray) -> np.ndarray:
    """Of a batch, the logits of its rows, without those that only fill it up; or of their labelled tokens."""
    if examples.unlabelled is None:
        return logits[..., : len(rows), :]
    own = examples.labels[rows] != examples.unlabelled
    row, token = np.nonzero(own)
    return logits[..., row, token, :]


def _words(examples: Examples) -> np.ndarray:
    return (examples.labels != examples.unlabelled).sum(1)
