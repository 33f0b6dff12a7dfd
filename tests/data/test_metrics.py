import math

import numpy as np
import pytest

from jpeft.data import metrics
from jpeft.data.tasks import TASKS


def one_hot(ids, n):
    return np.eye(n)[ids]


def test_confusion_matrix_metrics_equal_their_formulas():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    labels[:80] = guesses[:80]
    tp, tn = np.sum(labels & guesses), np.sum((1 - labels) & (1 - guesses))
    fp, fn = np.sum((1 - labels) & guesses), np.sum(labels & (1 - guesses))
    logits = one_hot(guesses, 2) * 3 - 1

    found = TASKS["mrpc"].score(logits, labels)
    assert found == pytest.approx({"accuracy": (tp + tn) / 200, "f1": 2 * tp / (2 * tp + fp + fn)})
    assert list(found) == ["accuracy", "f1"]

    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert TASKS["cola"].score(logits, labels) == pytest.approx({"matthews_correlation": mcc})


def test_f1_is_of_class_1_and_not_symmetric():
    labels, logits = np.array([1, 0, 0, 0]), one_hot([1, 1, 0, 0], 2)
    assert TASKS["qqp"].score(logits, labels)["f1"] == pytest.approx(2 / 3)
    assert TASKS["qqp"].score(logits[:, ::-1], 1 - labels)["f1"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_correlations_equal_numpy(shape):
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 5, 50).round(1)
    logits = (labels + rng.normal(size=50)).astype(np.float32)
    found = TASKS["stsb"].score(logits.reshape(shape), labels)
    averaged_ranks = [[np.mean(np.flatnonzero(np.sort(x) == v)) for v in x] for x in (labels, logits)]
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, logits.astype(float))[0, 1], rel=1e-12)
    assert found["spearmanr"] == pytest.approx(np.corrcoef(averaged_ranks)[0, 1], rel=1e-12)


def test_three_classes():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 0.1, 0.3], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
    assert TASKS["mnli"].score(logits, np.array([0, 2, 1, 1])) == {"accuracy": 0.75}


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        ("cola", one_hot([1, 1, 1, 1], 2), [0, 1, 0, 1]),
        ("cola", one_hot([1, 0, 1, 0], 2), [1, 1, 1, 1]),
        ("stsb", np.full((4, 1), 2.5), [0.0, 1.0, 2.0, 3.0]),
        ("stsb", 2.5 + 1e-7 * np.arange(4), [0.0, 1.0, 2.0, 3.0]),
        ("stsb", np.zeros(4), [0.0, 1.0, 2.0, 3.0]),
        ("stsb", np.arange(4.0), [1.0, 1.0, 1.0, 1.0]),
        ("stsb", np.ones(1), [1.0]),
    ],
)
def test_constant_predictions_or_labels_score_zero_without_a_warning(task, logits, labels):
    assert set(TASKS[task].score(logits, np.array(labels)).values()) == {0.0}


def test_f1_without_positives_is_zero():
    assert TASKS["mrpc"].score(one_hot([0, 0], 2), np.array([0, 0])) == {"accuracy": 1.0, "f1": 0.0}


def test_rows_that_are_not_finite_are_counted():
    logits = np.zeros((5, 3))
    logits[1, 0], logits[3] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 5 rows"):
        TASKS["mnli"].score(logits, np.zeros(5, int))


@pytest.mark.parametrize(("logits", "n"), [(np.zeros((3, 2)), 3), (np.zeros((3, 3)), 4), (np.zeros((0, 3)), 0)])
def test_shapes_that_do_not_fit_are_refused(logits, n):
    with pytest.raises(ValueError, match="do not fit"):
        TASKS["mnli"].score(logits, np.zeros(n, int))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_names_known_metrics(task):
    assert task.primary in task.metrics
    assert set(task.metrics) <= set(metrics.METRICS)
