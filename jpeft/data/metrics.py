"""The official GLUE metrics, by the names that Hugging Face's `evaluate` gives them.

scikit-learn and SciPy compute them and load when they are used. Where all predictions or all labels are the same,
Matthews' coefficient and the correlations are undefined and count as 0, scikit-learn's convention for the former. So
does F1 where nothing is positive.
"""

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["METRICS", "compute"]


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean(labels == predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    if not np.any(labels == 1) and not np.any(predictions == 1):
        return 0.0
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1))


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro"))


def _matthews_correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
    # scikit-learn returns 0 here too, but warns of a single label on the way.
    if _constant(labels) or _constant(predictions):
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    if _constant(labels) or _constant(predictions):
        return 0.0
    from scipy.stats import pearsonr

    return np.asarray(pearsonr(labels, predictions))[0].item()


def _spearmanr(labels: np.ndarray, predictions: np.ndarray) -> float:
    if _constant(labels) or _constant(predictions):
        return 0.0
    from scipy.stats import spearmanr

    return np.asarray(spearmanr(labels, predictions))[0].item()


def _constant(values: np.ndarray) -> bool:
    # Up to rounding: a collapsed regression differs in its last bits, and a correlation with those is noise.
    return bool(np.ptp(values) <= 1e-6 * np.max(np.abs(values)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearmanr,
}


def compute(names: Sequence[str], logits: np.ndarray, labels: np.ndarray, num_labels: int) -> dict[str, float]:
    """Computes metrics.

    Args:
      names: which, keys of `METRICS`.
      logits: [n, num_labels]; for regression [n, 1] or [n], the predicted values.
      labels: [n] class ids, or values.
      num_labels: the number of classes, 1 for regression.

    Returns:
      The metrics by name, in the order of `names`.

    Raises:
      ValueError: if there are no rows, the numbers of rows or classes do not fit, or logits are not finite.

    >>> logits = np.array([[0.1, 0.9], [0.2, 0.7], [0.8, 0.3], [0.6, 0.4]])
    >>> compute(["accuracy", "f1"], logits, np.array([1, 0, 0, 0]), num_labels=2)
    {'accuracy': 0.75, 'f1': 0.6666666666666666}
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    logits = logits.reshape(-1, 1) if logits.ndim == 1 and num_labels == 1 else logits
    if not len(labels) or logits.shape != (len(labels), num_labels):
        raise ValueError(
            f"logits {list(logits.shape)} do not fit {len(labels)} labels: "
            f"expected [{len(labels)}, {num_labels}], at least one row"
        )
    bad = int(np.sum(~np.isfinite(logits).all(axis=1)))
    if bad:
        raise ValueError(f"{bad} of {len(labels)} rows have logits that are not finite")
    predictions = logits[:, 0].astype(np.float64) if num_labels == 1 else logits.argmax(axis=1)
    return {name: METRICS[name](labels, predictions) for name in names}
