"""Comparisons: means, spread, and intervals that know the noise of rows and of seeds."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jpeft.data.kinds import IGNORED
from jpeft.data.task import Task
from jpeft.data.tasks import TASKS
from jpeft.report import comparison
from jpeft.report.comparison import Outcome

N = 2000
LABELS = np.random.default_rng(0).integers(0, 2, N)


def outcome(variant, seed, accuracy, task="sst2", trainable=1.0):
    right = np.random.default_rng([seed, int(1e6 * accuracy), len(variant)]).random(N) < accuracy
    return Outcome(TASKS[task], variant, seed, np.where(right, LABELS, 1 - LABELS), LABELS, trainable, 0.5)


def test_the_interval_is_that_of_the_normal_approximation():
    one, two = outcome("one", 1, 0.80), outcome("two", 1, 0.90)
    row = comparison.summarise([one, two])["sst2"]["one"]
    hits = (one.predictions == LABELS).astype(float) - (two.predictions == LABELS)
    assert row.behind == pytest.approx(hits.mean())
    half = 1.96 * hits.std() / np.sqrt(N)
    assert row.interval == pytest.approx((hits.mean() - half, hits.mean() + half), abs=0.15 * half)
    assert not row.tied


def test_seeds_that_disagree_widen_the_interval():
    steady = [outcome("worse", s, 0.84) for s in (1, 2, 3, 4)]
    wild = [outcome("worse", s, 0.84 + d) for s, d in zip((1, 2, 3, 4), (-0.06, 0.06, -0.05, 0.05), strict=True)]
    best = [outcome("best", s, 0.87) for s in (1, 2, 3, 4)]
    narrow, wide = (comparison.summarise([*x, *best])["sst2"]["worse"].interval for x in (steady, wild))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert narrow[1] < 0 < wide[1]


def test_the_best_comes_first_and_equals_tie():
    a, b = outcome("a", 1, 0.9), outcome("a", 1, 0.9)._replace(variant="b")
    rows = comparison.summarise([outcome("c", 1, 0.6), a, b])["sst2"]
    assert list(rows) == ["a", "b", "c"]
    assert (rows["b"].behind, rows["b"].interval) == (0.0, (0.0, 0.0))
    assert [row.tied for row in rows.values()] == [True, True, False]
    assert rows["a"].std is None


def test_only_common_seeds_are_paired():
    rows = comparison.summarise(
        [outcome("a", 1, 0.9), outcome("a", 2, 0.9), outcome("b", 1, 0.8), outcome("c", 3, 0.1)]
    )
    one, two = outcome("a", 1, 0.9), outcome("b", 1, 0.8)
    assert rows["sst2"]["b"].behind == pytest.approx(two.score() - one.score())
    assert np.isnan(rows["sst2"]["c"].behind)
    assert rows["sst2"]["c"].tied  # for all that is known


def test_a_regression_is_scored_by_its_values():
    labels = np.linspace(0, 5, 50)
    found = Outcome(TASKS["stsb"], "x", 1, 2 * labels + np.random.default_rng(0).normal(size=50), labels, 1.0, 0.0)
    assert found.score() == pytest.approx(np.corrcoef(found.predictions, labels)[0, 1])


def test_entities_are_counted_once_and_drawn_with_their_sentences():
    rng, metrics = np.random.default_rng(0), ("entity_f1", "accuracy")
    task = Task("ner", ("words",), ("O", "B-X", "I-X", "B-Y"), metrics, "entity_f1", kind="tagging")
    labels = rng.integers(0, 4, (40, 7))
    labels[np.arange(7) >= rng.integers(1, 8, (40, 1))] = IGNORED
    said = np.where(rng.random(labels.shape) < 0.7, labels, rng.integers(0, 4, labels.shape))
    found = Outcome(task, "x", 1, np.where(labels == IGNORED, IGNORED, said), labels, 1.0, 0.0)
    again = np.random.default_rng(0)
    expected = [found.score(again.integers(0, 40, 40)) for _ in range(20)]
    np.testing.assert_allclose(comparison.resampled(found, 20), expected)
    assert np.std(expected) > 0.01


def test_a_score_of_the_users_own_is_given_the_logits_of_the_drawn_rows():
    """Of words, those of the sentences that are drawn."""
    rng, seen = np.random.default_rng(0), []

    class Own(Task):
        def score(self, logits, labels):
            seen.append((logits, labels))
            return {"mine": 1.0}

    labels = rng.integers(0, 2, (6, 4))
    labels[np.arange(4) >= rng.integers(1, 5, (6, 1))] = IGNORED
    words = rng.normal(size=((labels != IGNORED).sum(), 2))
    task = Own("own", ("words",), ("a", "b"), ("mine",), "mine", kind="tagging")
    rows = np.array([3, 0, 3])
    Outcome(task, "x", 1, labels, labels, 1.0, 0.0, words).score(rows)
    ends = np.cumsum((labels != IGNORED).sum(1))
    expected = np.concatenate([words[ends[i] - (labels[i] != IGNORED).sum() : ends[i]] for i in rows])
    np.testing.assert_array_equal(seen[0][0], expected)
    np.testing.assert_array_equal(seen[0][1], labels[rows])


class Curve(Task):
    def score(self, logits, labels):
        return {"auc": float(roc_auc_score(labels, logits[:, 1]))}


@pytest.mark.filterwarnings("ignore:Only one class is present")
def test_a_score_that_some_draws_do_not_have():
    """A third of the draws has rows of one class alone, and so no area under a curve."""
    labels = np.arange(40) < 1
    task = Curve("own", ("text",), ("a", "b"), ("auc",), "auc")

    def of(variant, noise):
        logits = np.stack([-(labels + noise), labels + noise], 1)
        return Outcome(task, variant, 1, logits.argmax(1), labels.astype(int), 1.0, 0.0, logits)

    rng = np.random.default_rng(0)
    rows = comparison.summarise([of("good", np.zeros(40)), of("bad", 3 * rng.normal(size=40))])["own"]
    low, high = rows["bad"].interval
    assert rows["good"].tied
    assert np.isfinite([low, high]).all()
    assert np.isnan(comparison.resampled(of("good", np.zeros(40)), 100)).mean() > 0.2
    empty = {1: np.full(10, np.nan)}
    assert comparison.difference({1: of("a", 0)}, {1: of("b", 0)}, empty, empty)[1] == (-np.inf, np.inf)


def test_entities_by_a_score_of_the_users_own():
    class Own(Task):
        def score(self, logits, labels):
            return {"entity_f1": 0.25}

    labels = np.array([[0, 1], [1, 0]])
    task = Own("own", ("words",), ("B-x", "O"), ("entity_f1",), "entity_f1", kind="tagging")
    one = Outcome(task, "x", 1, labels, labels, 1.0, 0.0, np.zeros((4, 2)))
    np.testing.assert_array_equal(comparison.resampled(one, 5), [0.25] * 5)


def test_the_baseline_is_the_answer_that_reads_no_text():
    share = float(np.mean(LABELS))
    assert comparison.baselines([outcome("good", 1, 0.9)]) == {"sst2": pytest.approx(max(share, 1 - share))}


def test_the_deviation_is_that_of_a_sample_of_seeds():
    runs = [outcome("a", seed, accuracy) for seed, accuracy in ((1, 0.8), (2, 0.85), (3, 0.95))]
    row = comparison.summarise(runs, draws=2)["sst2"]["a"]
    assert row.std == pytest.approx(np.std([o.score() for o in runs], ddof=1))
