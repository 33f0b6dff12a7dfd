"""Kinds of answer, against loops over rows, words and classes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.data.kinds import IGNORED, KINDS, flat, over_words

RNG = np.random.default_rng(0)


def log_softmax(row):
    return row - math.log(sum(math.exp(x) for x in row))


def test_the_loss_of_several_classes_is_the_mean_over_them():
    logits, labels = RNG.normal(size=(5, 3)).astype(np.float32), RNG.integers(0, 2, (5, 3)).astype(np.float32)
    for found, row, own in zip(KINDS["multilabel"].loss(logits, labels), logits, labels, strict=True):
        shares = [1 / (1 + math.exp(-x)) for x in row]
        by_hand = [-math.log(p if y else 1 - p) for p, y in zip(shares, own, strict=True)]
        assert found == pytest.approx(sum(by_hand) / 3, rel=1e-5)


def test_the_loss_of_tags_is_the_mean_over_the_words_of_a_row():
    logits = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    labels = np.array([[IGNORED, 1, IGNORED, 4], [IGNORED, 0, 2, 3], [IGNORED] * 4])
    found = KINDS["tagging"].loss(jnp.asarray(logits), jnp.asarray(labels))
    for loss, row, own in zip(found, logits, labels, strict=True):
        by_hand = [-log_softmax(token)[i] for token, i in zip(row, own, strict=True) if i != IGNORED]
        assert loss == pytest.approx(np.mean(by_hand) if by_hand else 0, rel=1e-5)


def test_tokens_without_a_label_have_no_gradient():
    labels = jnp.array([[IGNORED, 1, IGNORED], [IGNORED, IGNORED, IGNORED]])
    grads = jax.grad(lambda x: KINDS["tagging"].loss(x, labels).sum())(jnp.ones((2, 3, 4)))
    assert np.isfinite(grads).all()
    assert (np.abs(grads).sum(-1) > 0).tolist() == [[False, True, False], [False, False, False]]


def test_means_over_words():
    values, labels = np.float32([[1.0, 2.0, 6.0], [1.0, 1.0, 1.0]]), np.array([[IGNORED, 0, 1], [IGNORED] * 3])
    np.testing.assert_allclose(over_words(jnp.asarray(values), jnp.asarray(labels)), [4, 0])


def test_answers_that_read_no_text():
    classes = np.array([0, 2, 2, 1])
    assert KINDS["classification"].guess(classes, classes[:2], 3).argmax(1).tolist() == [2, 2]
    many = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1]])
    assert (KINDS["multilabel"].guess(many, many[:2], 3) > 0).tolist() == [[True, False, False]] * 2
    words = np.array([[IGNORED, 1, 1, IGNORED], [IGNORED, 0, 1, 2]])
    assert KINDS["tagging"].guess(words, words, 3).argmax(1).tolist() == [1] * 5


@pytest.mark.parametrize(
    ("kind", "labels", "counts"),
    [
        ("classification", [0, 2, 2], [1, 0, 2]),
        ("multilabel", [[1, 0, 1], [0, 0, 1]], [1, 0, 2]),
        ("tagging", [[IGNORED, 0, 2], [IGNORED, IGNORED, 2]], [1, 0, 2]),
    ],
)
def test_counts(kind, labels, counts):
    assert KINDS[kind].counts(np.array(labels), 3).tolist() == counts


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_expressed_is_decided_again(kind):
    answers = {
        "classification": np.array([0, 2, 1]),
        "regression": np.array([0.5, -1.0]),
        "multilabel": np.array([[0, 1, 1], [0, 0, 0]]),
        "tagging": np.array([[IGNORED, 2, IGNORED], [IGNORED, 0, 1]]),
    }[kind]
    found = KINDS[kind].decide(KINDS[kind].express(answers, 3))
    np.testing.assert_array_equal(found, flat(answers) if kind == "tagging" else answers)
