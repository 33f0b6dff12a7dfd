import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft import UserError, fisher
from jpeft.fisher import expected_fisher


def close_by_leaf(got, wanted, tolerance=1e-5):
    """norm(a - b) <= tolerance norm(b) + 1e-12 of the largest leaf, for every leaf."""
    largest = max(np.linalg.norm(x) for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * np.linalg.norm(b) + 1e-12 * largest


def loop(loss, tree, examples, n):
    total = jax.tree.map(np.zeros_like, tree)
    for i in range(n):
        grad = jax.grad(loss)(tree, jax.tree.map(lambda x, i=i: x[i], examples))
        total = jax.tree.map(lambda t, g: t + np.asarray(g) ** 2, total, grad)
    return jax.tree.map(lambda t: t / n, total)


@pytest.mark.parametrize("microbatch", [None, 3, 4])
def test_equals_a_loop_over_examples(toy, key, microbatch):
    method = jpeft.chain(jpeft.prefix(2, 4), jpeft.pfeiffer(2), jpeft.lora(2))
    leaves = randomised(jpeft.init(method, key, toy.sites))

    def loss(leaves, example):
        ids, mask, label = example
        return -jax.nn.log_softmax(toy.logits(method, leaves, ids=ids[None], mask=mask[None])[0])[label]

    examples = (toy.ids, toy.mask, toy.labels)
    close_by_leaf(fisher(loss, leaves, examples, microbatch=microbatch), loop(jax.jit(loss), leaves, examples, 4))


def test_equals_finite_differences_in_double_precision():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(5, 3)))
        loss = lambda w, row: jnp.sin(w @ row) ** 2
        step = 1e-6 * np.eye(3)
        wanted = np.mean([[((loss(w + d, row) - loss(w - d, row)) / 2e-6) ** 2 for d in step] for row in x], axis=0)
        got = fisher(loss, w, x, microbatch=2)
        assert got.dtype == np.float64
        assert np.allclose(got, wanted, atol=1e-8)
        close_by_leaf(got, loop(loss, w, x, 5), tolerance=1e-12)


def test_a_mean_of_squares_is_not_the_square_of_a_mean():
    # The gradients 1 and -1 cancel; their squares do not.
    assert fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0, -1.0]), microbatch=2) == 1.0


def test_what_is_frozen_is_an_argument():
    loss = lambda w, x, scale: scale * w * x
    got = fisher(loss, jnp.float32(0.0), jnp.array([1.0, 2.0]), jnp.float32(3.0))
    assert got == pytest.approx((9 + 36) / 2)


def test_one_compilation_whatever_the_number_of_examples():
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(lambda w, x: jnp.sum(w * x), n=1)
    fisher(loss, jnp.ones(2), jnp.ones((7, 2)), microbatch=3)


def test_any_pytree():
    tree = {"a": [jnp.ones(2)], "b": (jnp.ones(()),)}
    got = fisher(lambda t, x: x * t["a"][0].sum() + t["b"][0], tree, jnp.array([2.0]))
    chex.assert_trees_all_close(got, {"a": [jnp.full(2, 4.0)], "b": (jnp.ones(()),)})


@pytest.mark.parametrize(("examples", "microbatch"), [(jnp.ones((0,)), None), (jnp.ones(2), 0)])
def test_nothing_to_measure(examples, microbatch):
    with pytest.raises(UserError, match="needs examples and a microbatch of at least 1"):
        fisher(lambda w, x: w * x, jnp.ones(()), examples, microbatch=microbatch)


def test_a_gradient_that_is_not_finite_names_the_leaf():
    tree = {"good": jnp.ones(()), "bad": jnp.zeros(())}
    with pytest.raises(UserError, match=r"'bad'.*not finite"):
        fisher(lambda t, x: x * t["good"] + jnp.sqrt(t["bad"]), tree, jnp.ones(2))


@pytest.mark.parametrize("values", ["square", "absolute"])
def test_expected_fisher_equals_a_loop_over_classes(values):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(5, 4)))
        logits = lambda w, row: jnp.tanh(row @ w)
        wanted = np.zeros((4, 3))
        for row in x:
            p = np.exp(logits(w, row)) / np.exp(logits(w, row)).sum()
            for c in range(3):
                grad = np.asarray(
                    jax.grad(lambda w: jnp.log(jnp.exp(logits(w, row))[c] / jnp.exp(logits(w, row)).sum()))(w)
                )
                wanted += p[c] * (grad**2 if values == "square" else np.abs(grad)) / 5
        got = expected_fisher(logits, w, x, values=values, microbatch=2)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_expected_fisher_of_regression_is_that_of_a_normal_distribution():
    """By sampling targets from N(logit, 1/2) and squaring the gradient of the squared error."""
    w, x = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [0.3, -0.7]])
    logit = lambda w, row: jnp.sin(w @ row)[None]
    got = expected_fisher(logit, w, x)
    noise = np.sqrt(0.5) * np.random.default_rng(0).normal(size=(100_000, 1))
    grads = [np.asarray(jax.grad(lambda w: logit(w, row)[0])(w)) for row in x]
    sampled = np.mean([np.mean((2 * noise * g) ** 2, axis=0) for g in grads], axis=0)
    np.testing.assert_allclose(got, sampled, rtol=0.02)


def test_absolute_values_are_averaged_too():
    assert fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0, -3.0]), values="absolute") == 2.0
    with pytest.raises(UserError, match="values 'cube' is unknown"):
        fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0]), values="cube")
