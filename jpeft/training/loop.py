"""The loop around the step: epochs, evaluation, checkpoints, resuming, and the bar that shows how it goes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.data import metrics
from jpeft.data.batching import Examples, eval_batches, num_batches, train_batches
from jpeft.data.tasks import Task
from jpeft.run.console import Console
from jpeft.training import checkpoint
from jpeft.training.step import State, Tree

__all__ = ["Fitted", "Schedule", "Steps", "compile_steps", "evaluate", "fit"]

CHECKPOINT_SECONDS = 300.0  # between epochs' ends, which are always saved
LOG_EVERY = 50  # steps


class Steps(NamedTuple):
    """Compiled on first use for each shape of batch; the time that takes is kept apart in `seconds["compile"]`."""

    train: Callable[[State, Tree, Any, Array], Any]
    eval: Callable[[Tree, Tree, Any], Array]


class Schedule(NamedTuple):
    """The sizes of a training run."""

    num_epochs: int
    batch_size: int
    seed: int
    buckets: tuple[int, ...]


class Fitted(NamedTuple):
    """The state after the last step, the rows of all epochs, and seconds by kind of work."""

    state: State
    history: list[dict[str, Any]]
    seconds: dict[str, float]


def compile_steps(train: Callable, evaluate: Callable, seconds: dict[str, float]) -> Steps:
    """Jits both steps; the training step takes over the buffers of its state.

    Args:
      train: see `jpeft.training.step.train_step`.
      evaluate: see `jpeft.training.step.eval_step`.
      seconds: its entry "compile" grows by the time of tracing and compiling.
    """

    def by_shape(fn: Callable, batch_at: int, **options: Any) -> Callable:
        jitted, compiled = jax.jit(fn, **options), {}

        def call(*args: Any) -> Any:
            shape = args[batch_at].input_ids.shape
            if shape not in compiled:
                start = time.perf_counter()
                compiled[shape] = jitted.lower(*args).compile()
                seconds["compile"] = seconds.get("compile", 0.0) + time.perf_counter() - start
            return compiled[shape](*args)

        return call

    return Steps(by_shape(train, 2, donate_argnums=0), by_shape(evaluate, 2))


def evaluate(
    eval_step: Callable[[Tree, Tree, Any], Array],
    trainable: Tree,
    frozen: Tree,
    examples: Examples,
    buckets: tuple[int, ...],
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


def fit(
    steps: Steps,
    state: State,
    frozen: Tree,
    train: Examples,
    dev: Examples,
    task: Task,
    schedule: Schedule,
    key: Array,
    seconds: dict[str, float],
    restored: checkpoint.Restored | None,
    folder: Path,
    log: Callable[[dict[str, Any]], None],
    console: Console,
) -> Fitted:
    """Trains for all epochs, evaluating after each, or goes on from where a checkpoint was taken.

    The order of the examples is a function of seed and epoch, and the dropout key one of key and step, so a run that
    was killed and started again ends with the same numbers as one that was not.

    Args:
      steps: from `compile_steps`.
      state: the state before the first step.
      frozen: the frozen parameters.
      train: training examples.
      dev: examples to evaluate on.
      task: says which metrics, and which of them is the best checkpoint's.
      schedule: the sizes of the run.
      key: the dropout key.
      seconds: grows by "train" and "evaluate"; the same dict that `compile_steps` was given.
      restored: what `folder/latest` held, if this run was started before.
      folder: `folder/latest` and `folder/best` hold the checkpoints.
      log: is given each row for `metrics.jsonl`.
      console: shows the progress.

    Raises:
      UserError: if the loss is not finite.
    """
    per_epoch = num_batches(train.size, schedule.batch_size)
    history: list[dict[str, Any]] = []
    loss_sum = 0.0
    if restored is not None:
        state, (history, loss_sum, spent) = restored
        seconds.update({name: seconds.get(name, 0.0) + value for name, value in spent.items()})
        console.say(f"resuming at step {int(state.step):,} of {per_epoch * schedule.num_epochs:,}")

    def save(name: str) -> None:
        kept = {name: seconds.get(name, 0.0) for name in ("fisher", "compile", "train", "evaluate")}
        checkpoint.save(folder / name, state, checkpoint.Progress(history, loss_sum, kept))

    with console.training(per_epoch * schedule.num_epochs, int(state.step)) as bar:
        for epoch in range(int(state.step) // per_epoch + 1, schedule.num_epochs + 1):
            start = int(state.step) % per_epoch
            clock = _Clock(seconds)
            saved = time.monotonic()
            batches = train_batches(train, schedule.batch_size, schedule.buckets, schedule.seed, epoch, start)
            for i, batch in enumerate(batches, start):
                state, step_metrics = steps.train(state, frozen, batch, key)
                loss = float(step_metrics.loss)
                if not np.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at step {(epoch - 1) * per_epoch + i + 1}: try a lower learning_rate"
                    )
                loss_sum += loss
                bar.advance(loss=loss_sum / (i + 1), epoch=epoch, examples=len(batch.labels))
                if (i + 1) % LOG_EVERY == 0:
                    norm = float(step_metrics.grad_norm)
                    log({"epoch": epoch, "step": int(state.step), "loss": loss, "grad_norm": norm})
                # Not after the last step of an epoch: its checkpoint is the one that also holds the scores.
                if i + 1 < per_epoch and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    clock.stop("train")
                    save("latest")
                    clock, saved = _Clock(seconds), time.monotonic()
            clock.stop("train")
            clock = _Clock(seconds)
            logits = evaluate(steps.eval, state.trainable, frozen, dev, schedule.buckets)
            scores = metrics.compute(task, logits, dev.labels)
            clock.stop("evaluate")
            row = {"epoch": epoch, "step": int(state.step), "train_loss": loss_sum / per_epoch, **scores}
            log(row)
            history, loss_sum = [*history, row], 0.0
            bar.epoch(row, task.primary)
            save("latest")
    return Fitted(state, history, seconds)


class _Clock:
    """Adds the time since it was made to one entry of `seconds`, less what was spent compiling meanwhile."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.compiled, self.start = seconds, seconds.get("compile", 0.0), time.perf_counter()

    def stop(self, name: str) -> None:
        elapsed = time.perf_counter() - self.start - (self.seconds.get("compile", 0.0) - self.compiled)
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
