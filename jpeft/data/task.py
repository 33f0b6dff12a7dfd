"""What a task is: its columns, how they are encoded, its loss, its metrics, the head that it needs, its splits.

A task of your own is a subclass that overrides what differs. `splits` is the least that it says:

    class Headlines(Task):
        def splits(self, path):
            return Splits({"train": ..., "validation": ...}, source="headlines")

    def get_task():
        return Headlines("headlines", text=("title",), labels=("sport", "politics"))

in a file that the config names: `--config.task=headlines.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.data import kinds
from jpeft.data.batching import Examples
from jpeft.data.encoding import tokenize, tokenize_words
from jpeft.data.kinds import KINDS, Kind
from jpeft.data.padding import Layout

__all__ = ["HIDDEN", "Data", "Splits", "Task", "example_losses", "further", "hidden", "is_hidden"]


class Splits(NamedTuple):
    """A loaded task.

    Attributes:
      splits: a `datasets.Dataset`, or columns by name, for each split. A column "label" holds class ids, or values; of
        multilabel a list of 0 and 1 a row, of tagging a list of ids.
      absent: the optional splits that were not found.
      empty_texts: for each split that has any, how many rows have an empty text. The rows are kept.
      source: where the data came from: a folder, a hub name, or "built in".
    """

    splits: dict[str, Any]
    absent: tuple[str, ...] = ()
    empty_texts: Mapping[str, int] = {}
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that a model with a head on top of its encoder can learn.

    Attributes:
      name: what reports call it.
      text: the columns with text, one or two; of tagging, one with lists of words.
      labels: the names of the classes in the order of their ids; () means regression.
      metrics: their names, as in `jpeft.data.metrics`.
      primary: the one to choose by; the higher, the better.
      eval_split: where to measure.
      optional_splits: splits that may be absent.
      trainable: whether there is a train split.
      label_range: the least and the greatest value of a regression.
      kind: of answer, a key of `jpeft.data.kinds.KINDS`; "" becomes classification, or regression if there are no
        labels.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    primary: str = "accuracy"
    eval_split: str = "validation"
    optional_splits: tuple[str, ...] = ("test",)
    trainable: bool = True
    label_range: tuple[float, float] = (float("-inf"), float("inf"))
    kind: str = ""

    def __post_init__(self) -> None:
        """Fills in the kind."""
        if not self.kind:
            object.__setattr__(self, "kind", "classification" if self.labels else "regression")

    @property
    def answers(self) -> Kind:
        """What its kind of answer says of losses, scores and heads."""
        return KINDS[self.kind]

    @property
    def num_labels(self) -> int:
        """The width of the head: the number of classes, 1 for regression."""
        return len(self.labels) or 1

    @property
    def required_splits(self) -> tuple[str, ...]:
        """The splits without which loading fails."""
        return ("train", self.eval_split) if self.trainable else (self.eval_split,)

    def splits(self, path: str | None = None) -> Splits:
        """Loads the splits.

        Args:
          path: `config.data.path`, a folder of the user's; None if it is not set.

        Raises:
          UserError: if the data cannot be loaded.
        """
        raise UserError(f"task {self.name!r} does not say where its data are: define its method `splits`")

    def encode(self, split: Any, tokenizer: Any, max_length: int) -> Examples:
        """Tokenises a split; rows longer than `max_length` tokens are cut, the longer text of a pair first."""
        if self.answers.by_token:
            return tokenize_words(split, self.text[0], tokenizer, max_length, kinds.IGNORED)
        label_type = np.int32 if self.kind == "classification" else np.float32
        return tokenize(split, self.text, tokenizer, max_length, label_type)

    def loss(self, logits: Array, labels: Array) -> Array:
        """The loss of each example, [b], from float32 logits and labels, whose shapes `jpeft.data.kinds` gives."""
        return self.answers.loss(logits, labels)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics by name, with `primary` among them.

        Args:
          logits: [n, num_labels]; for regression [n, 1] or [n], the predicted values; of tagging, those of all words.
          labels: as in `Examples`.

        Raises:
          ValueError: if there are no rows, the numbers of rows or classes do not fit, or logits are not finite.
        """
        return self.answers.score(self.metrics, self.labels, logits, labels)

    @property
    def own_score(self) -> bool:
        """Whether `score` is not that of `jpeft.Task`, and so may ask for more than decisions."""
        return type(self).score is not Task.score

    @property
    def own_encode(self) -> bool:
        """Whether `encode` is not that of `jpeft.Task`, and so makes of texts what no trained model knows."""
        return type(self).encode is not Task.encode

    def baseline(self, train: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics of an answer that reads no text: the most frequent class, or the mean value, of the training.

        Args:
          train: the labels of the training examples.
          labels: those to be scored on.
        """
        return self.scores(self.answers.guess(train, labels, self.num_labels), labels)

    def scores(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What `score` gives, as Python's numbers, which files can hold."""
        return {name: float(value) for name, value in self.score(logits, labels).items()}


class Data(NamedTuple):
    """A tokenised task.

    Attributes:
      task: which.
      train: examples to train on.
      dev: examples to evaluate on after every epoch.
      layouts: of the batches to train on; the last holds every batch.
      eval_buckets: the lengths that rows to evaluate on are padded to, ascending.
      others: examples of further splits with labels, by name, to evaluate on once, at the end.
      grouped: whether rows of one padded length meet in the batches to train on.
    """

    task: Task
    train: Examples
    dev: Examples
    layouts: Sequence[Layout]
    eval_buckets: Sequence[int]
    others: Mapping[str, Examples] = {}
    grouped: bool = False

    @property
    def batch_size(self) -> int:
        """Rows of a batch to train on."""
        return sum(part.rows for part in self.layouts[0])

    @property
    def longest(self) -> int:
        """The length that the longest rows to train on are padded to."""
        return self.layouts[-1][-1].length


HIDDEN = -1  # the label of a row that has none


def further(task: Task, found: Splits) -> list[str]:
    """The names of the splits that are there besides those to train and to choose by."""
    return [name for name in task.optional_splits if name in found.splits and name not in task.required_splits]


def is_hidden(label: Any) -> bool:
    """Whether a label says that a row has none."""
    return isinstance(label, int | float | np.number) and label == HIDDEN


def hidden(task: Task, labels: Sequence[float]) -> int:
    """How many rows of a split have no label, that is, -1. Where -1 can be a value, it is one unless all are -1."""
    without = sum(map(is_hidden, labels))
    is_value = not task.labels and task.label_range[0] <= HIDDEN
    return 0 if is_value and without < len(labels) else without


def example_losses(logits: Array, labels: Array) -> Array:
    """The loss of each example, [b]: cross entropy for class ids [b], squared error for values [b]."""
    return (kinds.entropy if jnp.issubdtype(labels.dtype, jnp.integer) else kinds.squares)(logits, labels)
