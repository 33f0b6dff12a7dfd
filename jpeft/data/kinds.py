"""The four kinds of answer that a model can learn to give, and what differs between them.

    classification   one class a row          labels [n] int32
    regression       one value a row          labels [n] float32
    multilabel       any number of classes    labels [n, C] float32, 0 or 1
    tagging          a class for every word   labels [n, t] int32 at the first token of each word, IGNORED elsewhere

A task names its kind; its loss, scores and decisions are all here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jpeft.data import metrics

__all__ = ["IGNORED", "KINDS", "Kind", "entropy", "flat", "over_words", "squares"]

IGNORED = -100  # the label of a token that has none: not the first of a word, or padding; as in Hugging Face


class Kind(NamedTuple):
    """One kind of answer.

    Attributes:
      loss: float32 logits and labels of b rows -> the loss of each row, [b].
      score: (names of metrics, names of classes, logits, labels of all rows) -> scores by name. Of tagging, the logits
        are those of the labelled tokens alone, [m, C], row after row.
      metrics: the metrics by default; the first is the one to choose by.
      guess: (labels of the training, labels to be scored on, C) -> logits of the best answer that reads no text.
      guess_name: what that answer is called.
      counts: labels, C -> how often each class occurs, [C].
      decide: logits [..., C] -> the answers: class ids, values, or 0 and 1 for each class.
      express: the inverse of `decide`, for scores: answers of all rows, C -> logits as `score` takes them.
      by_token: whether the head answers at every token, [b, t, C], and not once a row, [b, C].
    """

    loss: Callable[[Array, Array], Array]
    score: Callable[[Sequence[str], Sequence[str], np.ndarray, np.ndarray], dict[str, float]]
    metrics: tuple[str, ...]
    guess: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    guess_name: str
    counts: Callable[[np.ndarray, int], np.ndarray]
    decide: Callable[[np.ndarray], np.ndarray]
    express: Callable[[np.ndarray, int], np.ndarray]
    by_token: bool = False


def entropy(logits: Array, labels: Array) -> Array:
    """Cross entropy of classes, [b], from logits [b, C] and class ids [b]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def squares(logits: Array, labels: Array) -> Array:
    """Squared errors [b], from logits [b, 1] and values [b]."""
    return jnp.square(logits[:, 0] - labels)


def binary(logits: Array, labels: Array) -> Array:
    """The mean binary cross entropy over the classes, [b], from logits and labels [b, C]."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)


def tags(logits: Array, labels: Array) -> Array:
    """The mean cross entropy over the words of each row, [b], from logits [b, t, C] and labels [b, t].

    A row without words has the loss 0. Every row weighs the same, so that the loss of a batch is a mean over examples
    as for all other kinds; Hugging Face takes the mean over the words of a batch.
    """
    return over_words(entropy(logits, jnp.maximum(labels, 0)), labels)


def over_words(values: Array, labels: Array) -> Array:
    """The mean over the labelled tokens of each row, [b], of values [b, t]; 0 where there are none."""
    own = labels != IGNORED
    return jnp.sum(jnp.where(own, values, 0), -1) / jnp.maximum(own.sum(-1), 1)


def flat(labels: np.ndarray) -> np.ndarray:
    """The labels [n, t] of tagging, of the words alone: [m], row after row."""
    return labels[labels != IGNORED]


def _most_frequent(train: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    chosen = np.bincount(train, minlength=classes).argmax()
    return _one_hot(np.full(len(labels), chosen), classes)


def _of_most_rows(train: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    return np.broadcast_to(np.where(train.mean(0) > 0.5, 1.0, -1.0), labels.shape)


def _one_hot(ids: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[ids]


def _argmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits).argmax(-1)


KINDS: Mapping[str, Kind] = {
    "classification": Kind(
        loss=entropy,
        score=lambda names, classes, logits, labels: metrics.compute(names, logits, labels, len(classes)),
        metrics=("accuracy", "macro_f1"),
        guess=_most_frequent,
        guess_name="majority class",
        counts=lambda labels, classes: np.bincount(labels, minlength=classes),
        decide=_argmax,
        express=_one_hot,
    ),
    "regression": Kind(
        loss=squares,
        score=lambda names, _, logits, labels: metrics.compute(names, logits, labels, 1),
        metrics=("pearson", "spearmanr"),
        guess=lambda train, labels, _: np.full((len(labels), 1), train.mean()),
        guess_name="mean value",
        counts=lambda labels, _: np.array([len(labels)]),
        decide=lambda logits: np.asarray(logits)[..., 0],
        express=lambda answers, _: answers[:, None],
    ),
    "multilabel": Kind(
        loss=binary,
        score=lambda names, _, logits, labels: metrics.compute_many(names, logits, labels),
        metrics=("micro_f1", "macro_f1", "exact_match"),
        guess=_of_most_rows,
        guess_name="classes of most rows",
        counts=lambda labels, _: labels.sum(0).astype(int),
        decide=lambda logits: (np.asarray(logits) > 0).astype(np.int32),
        express=lambda answers, _: 2.0 * answers - 1,
    ),
    "tagging": Kind(
        loss=tags,
        score=lambda names, classes, logits, labels: metrics.compute_tags(names, classes, logits, labels, IGNORED),
        metrics=("entity_f1", "entity_precision", "entity_recall", "accuracy"),
        guess=lambda train, labels, classes: _most_frequent(flat(train), flat(labels), classes),
        guess_name="most frequent tag",
        counts=lambda labels, classes: np.bincount(flat(labels), minlength=classes),
        decide=_argmax,
        express=lambda answers, classes: _one_hot(flat(answers), classes),
        by_token=True,
    ),
}
