"""Holds a task of the user's own against what a run needs of it, before a model is trained on something else."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpeft.core.errors import UserError, nearest, one_line
from jpeft.data.kinds import IGNORED, KINDS
from jpeft.data.metrics import MANY, METRICS, TAGS, is_entity_scheme
from jpeft.data.task import Splits, Task, further, is_hidden

__all__ = ["check_splits", "check_task", "splits"]


def check_task(task: Task) -> None:
    """Checks the attributes, the loss and the scores of a task.

    Raises:
      UserError: for the first that is not what `Task` says.
    """
    for name, least in (("text", 1), ("labels", 0), ("metrics", 1)):
        value = getattr(task, name)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < least:
            raise UserError(f"{name} must be a tuple of names, got {value!r:.60}")
        if not all(isinstance(x, str) for x in value) or len(set(value)) < len(value):
            raise UserError(f"{name} must be distinct names, got {value!r:.60}")
    if task.kind not in KINDS:
        raise UserError(f"kind {task.kind!r} is unknown: {nearest(task.kind, KINDS)}")
    if len(task.text) > 2:
        raise UserError(f"text must name one or two columns, got {task.text}")
    if task.answers.by_token and len(task.text) > 1:
        raise UserError(f"text must name the one column with words, got {task.text}")
    if len(task.labels) == 1:
        raise UserError(f"labels must be at least two, or none for a regression, got {task.labels}")
    if not task.own_score:
        known = {"multilabel": MANY, "tagging": (*TAGS, *METRICS), "regression": KINDS["regression"].metrics}
        known = known.get(task.kind, tuple(METRICS))
        for name in task.metrics:
            if name not in known:
                raise UserError(f"metric {name!r} is unknown for {task.kind}: {nearest(name, known)}")
            if name in TAGS and not is_entity_scheme(task.labels):
                raise UserError(f"metric {name!r} needs labels such as O, B-PER and I-PER, got {task.labels!r:.80}")
    if task.primary not in task.metrics:
        raise UserError(f"primary {task.primary!r} is not among the metrics {', '.join(task.metrics)}")
    if (task.kind == "regression") != (not task.labels):
        raise UserError(f"kind {task.kind!r} does not go with {len(task.labels)} labels")
    n, classes = 8, task.num_labels
    labels = _labels(task, n)
    logits = np.random.default_rng(0).normal(size=(n, classes)).astype(np.float32)
    of_rows = np.repeat(logits[:, None], labels.shape[1], 1) if task.answers.by_token else logits
    shape = _guarded("loss", lambda: jax.eval_shape(task.loss, of_rows, labels)).shape
    if shape != (n,):
        raise UserError(f"loss must give one number for each example, [{n}], got {list(shape)}")
    scores = _guarded("score", lambda: task.score(logits, labels))
    same = _guarded("score of one answer for all rows", lambda: task.score(np.zeros_like(logits) + logits[:1], labels))
    if not isinstance(scores, dict) or set(scores) != set(task.metrics):
        raise UserError(f"score must give {{metric: number}} for {', '.join(task.metrics)}, got {scores!r:.80}")
    for name, value in (*scores.items(), *same.items()):
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
            raise UserError(f"score gives {value!r:.60} for {name}: expected a finite number, of equal answers, too")


def _labels(task: Task, n: int) -> np.ndarray:
    """Labels of n rows, as a task of this kind has them; one word a row."""
    ids = np.arange(n) % task.num_labels
    found = {
        "classification": ids,
        "regression": np.linspace(0, 1, n),
        "multilabel": np.eye(task.num_labels)[ids],
        "tagging": np.stack([np.full(n, IGNORED), ids, np.full(n, IGNORED)], 1),
    }[task.kind]
    return found.astype(np.int32 if task.kind in ("classification", "tagging") else np.float32)


def _guarded(what: str, call: Any) -> Any:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # the user's code
        raise UserError(f"{what} fails: {type(error).__name__}: {one_line(error):.200}") from None


def splits(task: Task, path: str | None) -> Splits:
    """What `task.splits(path)` gives, checked.

    Raises:
      UserError: if it fails, or a run cannot use it.
    """
    return check_splits(task, _guarded("splits", lambda: task.splits(path)))


def check_splits(task: Task, found: Any) -> Splits:
    """Returns what `task.splits` gave, if a run can use it.

    Raises:
      UserError: if a split or a column is missing, columns are not of one length, a text is none, or a label is not an
        id of a class, or a finite value.
    """
    if not isinstance(found, Splits):
        raise UserError(f"splits must give a jpeft Splits, got {type(found).__name__}")
    for name in (*task.required_splits, *further(task, found)):
        if name not in found.splits:
            raise UserError(f"splits has no {name!r} split: {nearest(name, found.splits)}")
        split = found.splits[name]
        columns = {}
        for column in (*task.text, "label"):
            try:
                columns[column] = list(split[column])
            except (KeyError, TypeError):
                raise UserError(f"the {name} split has no column {column!r}") from None
        _check_names(task, name, split)
        sizes = {column: len(values) for column, values in columns.items()}
        if len(set(sizes.values())) > 1 or not sizes["label"]:
            raise UserError(f"the {name} split must have rows, as many in each column, got {sizes}")
        for column in task.text:
            texts = columns[column]
            if task.answers.by_token and not all(isinstance(row, list | tuple) and row for row in texts):
                raise UserError(f"the {name} split: column {column!r} holds something else than lists of words")
            words = itertools.chain(*texts) if task.answers.by_token else texts
            if not all(isinstance(text, str) for text in words):
                raise UserError(f"the {name} split: column {column!r} holds something else than text")
        for i, (label, words) in enumerate(zip(columns["label"], columns[task.text[0]], strict=True)):
            if name not in task.required_splits and is_hidden(label):
                continue
            if task.kind in ("multilabel", "tagging"):
                _check_list(task, f"the {name} split, row {i}", label, words)
            else:
                _check_label(task, f"the {name} split, row {i}", label)
    return found


def _check_names(task: Task, name: str, split: Any) -> None:
    """Checks that a split of `datasets` has its classes in the order of the task's."""
    kind = getattr(split, "features", {}).get("label")
    theirs = getattr(getattr(kind, "feature", kind), "names", None) or ()  # of a ClassLabel, or of a list of them
    first, second = ([label.casefold() for label in labels] for labels in (theirs, task.labels))
    if sorted(first) == sorted(second) and first != second:
        raise UserError(
            f"the {name} split has the classes {', '.join(theirs)}, and the task {', '.join(task.labels)}: expected "
            "the same order"
        )


def _check_list(task: Task, where: str, row: Any, words: Any) -> None:
    tagging = task.kind == "tagging"
    if not isinstance(row, list | tuple | np.ndarray) or len(row) != (len(words) if tagging else len(task.labels)):
        wanted = "a list of one id a word" if tagging else f"a list of {len(task.labels)} numbers, 0 or 1"
        raise UserError(f"{where}: label {row!r:.40} is not {wanted}")
    if not tagging and not all(x in (0, 1) for x in row):
        raise UserError(f"{where}: label {row!r:.40} has numbers besides 0 and 1")
    for label in row if tagging else ():
        _check_label(task, where, label)


def _check_label(task: Task, where: str, label: Any) -> None:
    number = isinstance(label, int | float | np.number) and not isinstance(label, bool)
    if task.labels and not (number and float(label).is_integer() and 0 <= label < len(task.labels)):
        raise UserError(f"{where}: label {label!r:.40} is not one of 0 to {len(task.labels) - 1}")
    if not task.labels and not (number and np.isfinite(label)):
        raise UserError(f"{where}: label {label!r:.40} is not a finite number")
