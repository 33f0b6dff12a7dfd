"""What the answers of finished runs tell: which classes are confused, whether confidence is earned, who errs alike."""

from typing import NamedTuple

import numpy as np

__all__ = ["Reliability", "agreement", "confusion", "is_classes", "reliability"]

BINS = 15  # of confidence, as in Guo et al. 2017


class Reliability(NamedTuple):
    """How often answers of a confidence are right.

    Attributes:
      confidence: [k], the mean probability of the answers in each bin that has some, ascending.
      accuracy: [k], the share of them that is right.
      share: [k], of all answers.
      error: the expected calibration error, the mean of |accuracy - confidence| over all answers.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray
    error: float


def is_classes(logits: np.ndarray, labels: np.ndarray) -> bool:
    """Whether these are answers of one class a row: logits [n, C] with C > 1, and class ids [n]."""
    return logits.ndim == 2 and logits.shape[1] > 1 and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[C, C] counts: rows are the labels, columns the answers."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, logits.argmax(-1), labels=range(logits.shape[1]))


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Answers in bins of equal width of their confidence (Guo et al. 2017, arXiv:1706.04599).

    Args:
      logits: [n, C].
      labels: [n], class ids.
      bins: how many.
    """
    from scipy.special import softmax

    probabilities = softmax(logits.astype(np.float64), axis=-1)
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    of = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(of, minlength=bins)
    own = counts > 0
    mean, accuracy = (np.bincount(of, weights=x, minlength=bins)[own] / counts[own] for x in (confidence, right))
    share = counts[own] / len(labels)
    return Reliability(mean, accuracy, share, float(share @ np.abs(mean - accuracy)))


def agreement(wrong: np.ndarray) -> np.ndarray:
    """How alike the errors of several runs are, [m, m]: of the rows that either has wrong, the share that both have.

    Args:
      wrong: [m, n], whether a run has a row wrong. Two runs without errors agree.
    """
    both = (wrong[:, None] & wrong[None]).sum(-1)
    either = (wrong[:, None] | wrong[None]).sum(-1)
    return np.divide(both, either, out=np.ones(both.shape), where=either > 0)
