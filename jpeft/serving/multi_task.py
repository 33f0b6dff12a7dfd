"""Rows of different tasks in one batch: one frozen base, and for each row the modules of its own task.

Every row is a batch of its own under `jax.vmap`. All rows share the base. What belongs to a task, its head and its
modules, is taken from stacks [capacity, ...] by the number of the task's slot, so tasks come and go without compiling.

At each site the modules of all tasks lie in levels, one around the other. A level holds one kind of module: the LoRAs,
as factors [in, r] and [r, out] padded with zeros to one rank, or modules whose wraps compile to the same program. Where
a task has no module on a level, zeros are the identity for LoRAs, and the others have a switch.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.transform import Chain
from jpeft.core.tree import flatten, unflatten
from jpeft.data.batching import Batch, Examples, eval_batches
from jpeft.data.kinds import KINDS
from jpeft.models.bert import Bert
from jpeft.serving.mixing import INSTEAD, MIXED, Path, Wrap, mixed, own_parts
from jpeft.serving.prediction import check_list, checked, encode, longest, shapes
from jpeft.store.modules import Saved
from jpeft.training.step import single_logits

__all__ = ["MultiTask"]


class _Task(NamedTuple):
    """A task: its slot, what says how its texts are read (without variables), and its row of the stacks."""

    slot: int
    saved: Saved
    row: dict[Path, np.ndarray]


class MultiTask:
    """One frozen base with the modules of many tasks, which answers rows of different tasks in one batch.

        many = jpeft.MultiTask({"mnli": first, "sst2": jpeft.load("runs/sst2/seed_11/model", base=first)})
        many.predict(["sst2", "mnli"], ["a fine film", ("it rains", "the sun shines")])

    A row may have its own head, its own modules around the sites of the base, and its own vectors in it (BitFit). What
    rewrites matrices of the base is refused, and so is what makes rows longer, as prompts do.

    A shape of a batch is compiled once. It is compiled again only if a new task has a kind of module, a rank or a
    number of labels beyond those before, or if the number of tasks exceeds the next power of two.
    """

    def __init__(self, tasks: Mapping[str, Saved] | None = None):
        self._base: Saved | None = None
        self._tasks: dict[str, _Task] = {}
        self._levels: dict[str, tuple[str, ...]] = {}  # at each site the kinds, from the inside out; they only grow
        # By site and kind: a wrap may do at one site what another one does there, and at others something else.
        self._wraps: dict[tuple[str, str], Wrap] = {}
        self._shapes: dict[Path, tuple[tuple[int, ...], Any]] = {}  # of the stacked leaves; they only grow
        self._capacity = self._width = 1
        self._transform = Chain(())
        self._ready: tuple[Bert, Any, Any] | None = None  # model, base and stacks, unless a task was added since
        if tasks is not None and not isinstance(tasks, Mapping):
            raise UserError(f"expected {{name: what jpeft.load returns}}, got {type(tasks).__name__}")
        for name, saved in (tasks or {}).items():
            self.add(name, saved)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self._tasks)

    def add(self, name: str, saved: Saved) -> None:
        """Adds a task, or replaces the one of this name. If it is refused, all stays as it was.

        Args:
          name: of the task.
          saved: from `jpeft.load`. With `base=` it shares the arrays of the base, and need not be compared with them.

        Raises:
          UserError: if it is for another base than the first task, or a method cannot be mixed with others.
        """
        if not isinstance(name, str):
            raise UserError(f"the name of a task must be a string, got {name!r:.60}")
        if not isinstance(saved, Saved):
            raise UserError(f"task {name!r}: expected what jpeft.load returns, got {type(saved).__name__}")
        if KINDS[saved.kind].by_token:
            raise UserError(f"task {name!r} has a head for words, the others answer once a row: {INSTEAD}")
        base = self._base or saved
        row, modules = own_parts(name, saved, base, {kind for _, kind in self._wraps})
        levels, at = dict(self._levels), defaultdict(int)
        for module in modules:
            have, start = levels.get(module.site, ()), at[module.site]
            i = have.index(module.kind, start) if module.kind in have[start:] else len(have)
            levels[module.site] = have if i < len(have) else (*have, module.kind)
            at[module.site] = i + 1
            row |= {("peft", MIXED, module.site, str(i), *path): x for path, x in flatten(module.leaves).items()}
        taken = {task.slot for other, task in self._tasks.items() if other != name}
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        self._base = base
        self._tasks[name] = _Task(slot, saved._replace(variables={}), {path: np.asarray(x) for path, x in row.items()})
        self._wraps = {(module.site, module.kind): module.wrap for module in modules} | self._wraps
        self._width = max(self._width, saved.model.config.num_labels)
        while self._capacity < len(self._tasks):
            self._capacity *= 2
        for path, x in row.items():
            shape, dtype = self._shapes.get(path, (x.shape, x.dtype))
            self._shapes[path] = tuple(map(max, shape, x.shape)), dtype
        if levels != self._levels:
            self._levels = levels
            self._transform = Chain(
                (mixed({path: [self._wraps[path, kind] for kind in levels[path]] for path in levels}),)
            )
        self._ready = None

    def remove(self, name: str) -> None:
        """Removes a task.

        Raises:
          UserError: if there is no such task.
        """
        self._known(name)
        del self._tasks[name]

    def predict(self, tasks: Sequence[str], texts: Sequence[str | tuple[str, str]]) -> list[np.ndarray]:
        """Computes the logits of texts, each by the modules of its own task.

        Args:
          tasks: the name of each text's task.
          texts: sentences or pairs of them, as the task was trained on; longer inputs are cut as in its training.

        Returns:
          For each text float32 logits [num_labels of its task], as `jpeft.predict` computes them.

        Raises:
          UserError: if a task is unknown, there are not as many tasks as texts, or a text is not one of its task.
        """
        check_list(texts)
        if not isinstance(tasks, Sequence | np.ndarray) or isinstance(tasks, str) or len(tasks) != len(texts):
            raise UserError(f"expected a list with the task of each of the {len(texts)} texts, got {tasks!r:.60}")
        if not len(texts):
            return []
        rows_of: dict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(tasks):
            rows_of[name].append(i)
        parts, widths = [], []
        for name, rows in rows_of.items():
            task = self._known(name)
            widths += [len(task.saved.labels) or 1] * len(rows)
            part = encode(task.saved, checked(task.saved, [texts[i] for i in rows], rows))
            # The labels, which nothing else reads here, carry the slots through the batching.
            parts.append(part._replace(labels=np.full_like(part.labels, task.slot)))
        examples = functools.reduce(_joined, parts)
        where = [i for rows in rows_of.values() for i in rows]
        model, base, stacks = self._stacked()
        answers: list[np.ndarray] = [np.zeros(0)] * len(texts)
        most = max(longest(self._tasks[name].saved) for name in rows_of)
        for batch, rows in eval_batches(examples, *shapes(examples.size, most)):
            logits = np.asarray(_answer(model, self._transform, base, stacks, batch))
            for row, own in zip(rows, logits[: len(rows)], strict=True):  # copies fill up the batch
                answers[where[row]] = own[: widths[row]]
        return answers

    def _known(self, name: str) -> _Task:
        if name not in self._tasks:
            raise UserError(f"there is no task {name!r:.60}: {nearest(str(name), self._tasks)}")
        return self._tasks[name]

    def _stacked(self) -> tuple[Bert, Any, Any]:
        """The model, the parameters that all tasks share, and the stacks [capacity, ...] of what they do not."""
        if self._ready is not None:
            return self._ready
        assert self._base is not None
        shared = flatten({"params": self._base.variables["params"]})
        stacks: dict[Path, Array] = {}
        for path, (shape, dtype) in self._shapes.items():
            stack = np.zeros((self._capacity, *shape), dtype)
            for task in self._tasks.values():
                x = task.row.get(path, shared.get(path))
                if x is not None:
                    stack[(task.slot, *map(slice, x.shape))] = x
            stacks[path] = jnp.asarray(stack)
        base = unflatten({path: x for path, x in shared.items() if path not in stacks})
        model = Bert(dataclasses.replace(self._base.model.config, num_labels=self._width))
        self._ready = model, {"peft": {}, **base}, {"peft": {}, **unflatten(stacks)}
        return self._ready


def _joined(first: Examples, second: Examples) -> Examples:
    return Examples(
        first.input_ids + second.input_ids,
        first.token_type_ids + second.token_type_ids,
        np.concatenate([first.labels, second.labels]),
        first.pad_id,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model: Bert, transform: Chain, base: Any, stacks: Any, batch: Batch) -> Array:
    """Float32 logits [b, greatest number of labels]; the labels of the batch are the slots of its rows."""
    own = jax.tree.map(lambda x: x[batch.labels], stacks)
    return jax.vmap(single_logits(model, transform), (0, 0, None))(own, batch, base)
