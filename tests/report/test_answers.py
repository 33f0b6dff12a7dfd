"""What answers tell, against loops over rows."""

import numpy as np
import pytest

from jpeft.report import answers

RNG = np.random.default_rng(0)
LOGITS, LABELS = 2 * RNG.normal(size=(200, 3)).astype(np.float32), RNG.integers(0, 3, 200).astype(np.int32)


def test_confusion_counts_labels_by_answers():
    table = answers.confusion(LOGITS, LABELS)
    for i in range(3):
        for j in range(3):
            assert table[i, j] == sum(a == j and b == i for a, b in zip(LOGITS.argmax(-1), LABELS, strict=True))


def test_the_calibration_error_is_that_of_a_loop_over_bins():
    found = answers.reliability(LOGITS, LABELS, bins=10)
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    confidence, right = probabilities.max(-1), LOGITS.argmax(-1) == LABELS
    error = 0.0
    for i in range(10):
        own = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        if own.any():
            error += own.mean() * abs(right[own].mean() - confidence[own].mean())
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.share.sum() == pytest.approx(1)
    assert (np.diff(found.confidence) > 0).all()


def test_certain_and_right_is_calibrated():
    found = answers.reliability(1e3 * np.eye(3), np.arange(3))
    assert found == ([1.0], [1.0], [1.0], 0.0)


def test_agreement_is_of_the_rows_that_either_has_wrong():
    wrong = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    found = answers.agreement(wrong)
    np.testing.assert_allclose(found, [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]])


def test_which_answers_are_classes():
    assert answers.is_classes(LOGITS, LABELS)
    assert not answers.is_classes(LOGITS[:, :1], LABELS.astype(np.float32))
    assert not answers.is_classes(LOGITS, RNG.integers(0, 2, (200, 3)))
