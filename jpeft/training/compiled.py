"""Programs compiled ahead, one for each shape of batch."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jpeft.data.batching import Batch, Examples, Hidden, filled
from jpeft.data.padding import Layout
from jpeft.data.task import Data
from jpeft.training import placement
from jpeft.training.step import State, StepMetrics, Tree

__all__ = ["EVAL_BATCH", "Compiled", "Steps", "planned_memory", "prepare"]

EVAL_BATCH = 32  # rows


class Compiled:
    """A jitted function with one program for each shape of batch, compiled ahead or on first use.

    Args:
      fn: the function.
      batch_at: which of its arguments is the batch.
      mesh: the devices among which the rows of batches are divided; results are on all of them. None: one device.
      **options: for `jax.jit`.

    Attributes:
      seconds: spent tracing and compiling so far.
    """

    def __init__(self, fn: Callable[..., Any], batch_at: int, mesh: Mesh | None = None, **options: Any):
        self.seconds = 0.0
        if mesh is not None:
            options["out_shardings"] = placement.whole(mesh)
        self._jitted, self._batch_at, self._mesh = jax.jit(fn, **options), batch_at, mesh
        self._programs: dict[tuple[tuple[int, ...], ...], Any] = {}

    def prepare(self, calls: Sequence[tuple[Any, ...]]) -> None:
        """Compiles a program for each of these arguments, which may be `jax.ShapeDtypeStruct`s, in parallel threads."""
        start = time.perf_counter()
        missing = {_shapes(args[self._batch_at]): args for args in calls}
        todo = {shape: args for shape, args in missing.items() if shape not in self._programs}
        with ThreadPoolExecutor(max(1, min(len(todo), os.cpu_count() or 1))) as threads:
            self._programs |= dict(zip(todo, threads.map(self._compile, todo.values()), strict=True))
        self.seconds += time.perf_counter() - start

    def memory(self) -> int:
        """The bytes that the largest of the programs needs, arguments and temporaries; 0 where XLA does not tell."""
        found = [program.memory_analysis() for program in self._programs.values()]
        return max((x.argument_size_in_bytes + x.temp_size_in_bytes for x in found if x is not None), default=0)

    def __call__(self, *args: Any) -> Any:
        """Calls the program for the shapes of the batch, or of its parts, which are argument number `batch_at`."""
        shape = _shapes(args[self._batch_at])
        if shape not in self._programs:
            start = time.perf_counter()
            self._programs[shape] = self._compile(args)
            self.seconds += time.perf_counter() - start
        if self._mesh is not None:
            batch = args[self._batch_at]
            args = self._with_batch(args, placement.put(batch, placement.rows(self._mesh, batch)))
        return self._programs[shape](*args)

    def _compile(self, args: tuple[Any, ...]) -> Any:
        if self._mesh is not None:
            batch = args[self._batch_at]
            shardings = placement.rows(self._mesh, batch)
            given = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, shardings)
            args = self._with_batch(args, given)
        return self._jitted.lower(*args).compile()

    def _with_batch(self, args: tuple[Any, ...], batch: Any) -> tuple[Any, ...]:
        return (*args[: self._batch_at], batch, *args[self._batch_at + 1 :])


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))


class Steps(NamedTuple):
    """The two functions that training calls, from `train_step` and `eval_step`.

    Attributes:
      train: (state, frozen, batch, key) -> (state, metrics).
      eval: (trainable, frozen, batch) -> logits.
      devices: among which the rows of a batch are divided.
    """

    train: Callable[[State, Tree, Any, Array], tuple[State, StepMetrics]]
    eval: Callable[[Tree, Tree, Any], Array]
    devices: int = 1

    @property
    def eval_rows(self) -> int:
        """The rows of a batch in evaluation."""
        return filled(EVAL_BATCH, self.devices)

    @classmethod
    def compiled(cls, train: Callable[..., Any], evaluate: Callable[..., Any], mesh: Mesh | None = None) -> "Steps":
        """Both as `Compiled`; the training step takes over the buffers of its state."""
        devices = 1 if mesh is None else mesh.size
        return cls(Compiled(train, 2, mesh, donate_argnums=0), Compiled(evaluate, 2, mesh), devices)


def prepare(steps: Steps, state: State, frozen: Tree, data: Data, key: Array) -> None:
    """Compiles the programs of steps that are `Compiled`, ahead of the first step.

    Args:
      steps: whose programs.
      state: as `fit` takes it, stacked where several runs train together; so is `key`, the dropout key.
      frozen: the variables that do not train.
      data: whose lengths.
      key: see `state`.
    """
    dev = [_shape(steps.eval_rows, length, data.dev) for length in _used(data.dev, data.eval_buckets)]
    if isinstance(steps.train, Compiled):
        steps.train.prepare([(state, frozen, _parts(steps, data, key.shape, each), key) for each in data.layouts])
    if isinstance(steps.eval, Compiled):
        steps.eval.prepare([(state.trainable, frozen, batch) for batch in dev])


def planned_memory(steps: Steps, state: State, frozen: Tree, data: Data, key: Array) -> int:
    """The bytes that training needs with the layout of the most tokens; 0 if the steps are not `Compiled`.

    Arguments as for `prepare`. The base model counts, though it may already be on the device.
    """
    if not isinstance(steps.train, Compiled):
        return 0
    steps.train.prepare([(state, frozen, _parts(steps, data, key.shape, data.layouts[-1]), key)])
    return steps.train.memory()


def _parts(steps: Steps, data: Data, runs: tuple[int, ...], layout: Layout) -> tuple[Batch, ...]:
    return tuple(_shape(filled(rows, steps.devices), length, data.train, runs) for rows, length in layout)


def _used(examples: Examples, buckets: Sequence[int]) -> list[int]:
    return sorted({min(b for b in buckets if b >= n) for n in set(examples.lengths.tolist())})


def _shape(rows: int, length: int, like: Examples, runs: tuple[int, ...] = ()) -> Batch:
    ids = jax.ShapeDtypeStruct((*runs, rows, length), np.int32)
    of_row = like.labels.shape[1:] if like.unlabelled is None else (length,)
    labels = jax.ShapeDtypeStruct((*runs, rows, *of_row), like.labels.dtype)
    return Batch(ids, ids, ids, labels, jax.ShapeDtypeStruct((*runs, rows), np.float32), _hidden(like, ids))


def _hidden(like: Examples, ids: jax.ShapeDtypeStruct) -> Hidden | None:
    if like.hidden is None:
        return None
    *rows, length = ids.shape
    row = like.hidden.states[0]
    shape = (*rows, like.hidden.width(length), row.shape[1])
    return Hidden(jax.ShapeDtypeStruct(shape, row.dtype), like.hidden.layer)
