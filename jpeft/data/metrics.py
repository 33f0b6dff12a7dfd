"""The official GLUE metrics, by the names that Hugging Face's `evaluate` gives them, and those of words and sets.

scikit-learn and SciPy compute them and load when they are used. Where all predictions or all labels are the same,
Matthews' coefficient and the correlations are undefined and count as 0, scikit-learn's convention for the former. So
does F1 where nothing is positive.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

__all__ = [
    "MANY",
    "METRICS",
    "TAGS",
    "compute",
    "compute_many",
    "compute_tags",
    "entities",
    "entity_counts",
    "entity_shares",
    "is_entity_scheme",
]


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

MANY = ("micro_f1", "macro_f1", "exact_match")
TAGS = ("entity_f1", "entity_precision", "entity_recall")


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
    _check(logits, len(labels), num_labels)
    predictions = logits[:, 0].astype(np.float64) if num_labels == 1 else logits.argmax(axis=1)
    return {name: METRICS[name](labels, predictions) for name in names}


def compute_many(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes metrics of rows that have any number of classes; a class counts as chosen where its logit is above 0.

    Args:
      names: of `MANY`. F1 is 0 where a class neither occurs nor is chosen.
      logits: [n, C].
      labels: [n, C], 0 or 1.

    Raises:
      ValueError: see `compute`.
    """
    logits, labels = np.asarray(logits), np.asarray(labels) > 0.5
    _check(logits, *labels.shape)
    chosen = logits > 0
    right, there, said = (x.sum(0) for x in (labels & chosen, labels, chosen))
    found = {
        "micro_f1": 2 * right.sum() / max(there.sum() + said.sum(), 1),
        "macro_f1": np.mean(2 * right / np.maximum(there + said, 1)),
        "exact_match": np.mean((labels == chosen).all(axis=1)),
    }
    return {name: float(found[name]) for name in names}


def compute_tags(
    names: Sequence[str], tags: Sequence[str], logits: np.ndarray, labels: np.ndarray, ignored: int
) -> dict[str, float]:
    """Computes metrics of words that have one tag each.

    Args:
      names: keys of `METRICS` for classes, over all words; or of `TAGS`, over the `entities` of all sentences together.
        A share of nothing is 0.
      tags: their names in the order of the logits.
      logits: [m, C] of the words of all sentences, one after the other.
      labels: [n, t] of n sentences, `ignored` where there is no word.
      ignored: see `labels`.

    Raises:
      ValueError: see `compute`.
    """
    labels = np.asarray(labels)
    words = labels != ignored
    true = labels[words]
    _check(np.asarray(logits), len(true), len(tags))
    chosen = np.full_like(labels, ignored)
    chosen[words] = np.asarray(logits).argmax(1)
    counts = entity_counts(tags, chosen, labels, ignored) if set(names) & set(TAGS) else np.zeros((1, 3))
    shares = entity_shares(counts)
    return {name: shares[name] if name in shares else METRICS[name](true, chosen[words]) for name in names}


def entity_counts(tags: Sequence[str], predictions: np.ndarray, labels: np.ndarray, ignored: int) -> np.ndarray:
    """The entities of each sentence, [n, 3]: those that were found, those that are there, those that were said.

    Args:
      tags: the names of the classes.
      predictions: [n, t], classes of the words.
      labels: likewise, `ignored` where there is no word.
      ignored: see `labels`.
    """
    found = np.zeros((len(labels), 3), int)
    for i, (said, true) in enumerate(zip(predictions, labels, strict=True)):
        words = true != ignored
        ours, theirs = (entities([str(tags[k]) for k in ids[words]]) for ids in (said, true))
        found[i] = len(ours & theirs), len(theirs), len(ours)
    return found


def entity_shares(counts: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 over all sentences together, from `entity_counts` of these; a share of nothing is 0."""
    right, there, said = counts.sum(0).tolist()
    return {
        "entity_precision": right / max(said, 1),
        "entity_recall": right / max(there, 1),
        "entity_f1": 2 * right / max(said + there, 1),
    }


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities (type, start, end) in the tags of a sentence, as the script of CoNLL-2000 reads them.

    Tags are "O", or one of B (begins), I (inside), E (ends), S (single) with a type, "B-PER"; L (last) is another name
    of E, and U (unit) of S. An I or E of another type than the word before, or after none, begins an entity.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 3, 4), ('PER', 0, 2)]
    """
    found, start, before = set(), 0, "O"
    for i, tag in enumerate([*tags, "O"]):
        tag = {"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:]
        goes_on = before[0] in "BI" and tag[0] in "IE" and before[1:] == tag[1:]
        if before != "O" and not goes_on:
            found.add((before[2:], start, i))
        if not goes_on:
            start = i
        before = tag
    return found


def is_entity_scheme(tags: Sequence[str]) -> bool:
    """Whether these are tags that `entities` reads."""
    return all(tag == "O" or re.fullmatch("[BIESLU]-.+", tag) for tag in tags) and any(tag != "O" for tag in tags)


def _check(logits: np.ndarray, n: int, width: int) -> None:
    if not n or logits.shape != (n, width):
        raise ValueError(
            f"logits {list(logits.shape)} do not fit {n} labels: expected [{n}, {width}], at least one row"
        )
    bad = int(np.sum(~np.isfinite(logits).all(axis=1)))
    if bad:
        raise ValueError(f"{bad} of {n} rows have logits that are not finite")
