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


def test_several_classes_equal_scikit_learn():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(3)
    labels, logits = (rng.random((50, 4)) < [0.5, 0.2, 0.9, 0]).astype(float), rng.normal(size=(50, 4))
    found = metrics.compute_many(metrics.MANY, logits, labels)
    chosen = logits > 0
    for average in ("micro", "macro"):
        by_peer = f1_score(labels, chosen, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(by_peer, abs=1e-12)
    rows = [all(a == b for a, b in zip(x, y, strict=True)) for x, y in zip(labels, chosen, strict=True)]
    assert found["exact_match"] == np.mean(rows)
    assert metrics.compute_many(["micro_f1", "macro_f1"], -np.ones((2, 3)), np.zeros((2, 3))) == {
        "micro_f1": 0.0, "macro_f1": 0.0,
    }  # fmt: skip


# What seqeval 1.2.2 finds in these, in its default mode.
SENTENCES = [
    ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
    ("I-PER I-PER I-LOC O", {("PER", 0, 2), ("LOC", 2, 3)}),
    ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
    ("O I-ORG B-ORG I-PER", {("ORG", 1, 2), ("ORG", 2, 3), ("PER", 3, 4)}),
    ("B-PER I-PER E-PER S-LOC", {("PER", 0, 3), ("LOC", 3, 4)}),
    ("E-PER E-PER O S-PER I-PER", {("PER", 0, 1), ("PER", 1, 2), ("PER", 3, 4), ("PER", 4, 5)}),
    ("O O", set()),
]
OTHER_NAMES = [
    ("B-PER I-PER L-PER U-LOC", {("PER", 0, 3), ("LOC", 3, 4)}),
    ("L-PER U-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
]


@pytest.mark.parametrize(("tags", "expected"), SENTENCES + OTHER_NAMES)
def test_entities(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entities_are_counted_over_all_sentences():
    tags = ("O", "B-X", "I-X")
    labels = np.array([[-100, 1, 2, 0], [-100, 1, -100, -100]])  # X of two words; X of one
    chosen = [1, 2, 1, 1]  # in the first sentence X of two words, and X of one that is not there
    names = ("entity_f1", "entity_precision", "entity_recall", "accuracy")
    found = metrics.compute_tags(names, tags, one_hot(chosen, 3), labels, -100)
    assert found == pytest.approx(
        {"entity_f1": 4 / 5, "entity_precision": 2 / 3, "entity_recall": 1.0, "accuracy": 3 / 4}
    )
    nothing = metrics.compute_tags(names, tags, one_hot([0, 0, 0, 0], 3), labels, -100)
    assert nothing == {"entity_f1": 0, "entity_precision": 0, "entity_recall": 0, "accuracy": 0.25}


def test_entities_do_not_reach_into_the_next_sentence():
    tags = ("O", "B-X", "I-X")
    labels = np.array([[1], [2]])
    assert metrics.compute_tags(("entity_f1",), tags, one_hot([1, 2], 3), labels, -100) == {"entity_f1": 1.0}
    assert metrics.compute_tags(("entity_recall",), tags, one_hot([1, 0], 3), labels, -100) == {"entity_recall": 0.5}


def test_schemes_of_entities():
    assert metrics.is_entity_scheme(("O", "B-PER", "I-PER"))
    assert metrics.is_entity_scheme(("O", "U-PER", "L-PER"))
    assert not metrics.is_entity_scheme(("NOUN", "VERB"))
    assert not metrics.is_entity_scheme(("O",))
