import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.transforms.parts.gate import gate_leaves, gate_value

X = jax.random.normal(jax.random.key(0), (3, 4, 6))
LEAVES = {"kernel": jax.random.normal(jax.random.key(1), (6, 1)), "bias": jnp.array([0.3])}


def opened(row, tokens):
    """The mean over some tokens of a row, with nothing shared with the source."""
    z = np.asarray(X[row], np.float64)[tokens] @ np.asarray(LEAVES["kernel"], np.float64)[:, 0] + 0.3
    return np.mean(1 / (1 + np.exp(-z)))


def test_the_mean_is_over_real_tokens():
    mask = jnp.array([[1, 1, 1, 1], [2, 1, 0, 0], [0, 0, 1, 0]])
    now = gate_value(X, LEAVES, mask)
    assert now.shape == (3, 1, 1)
    np.testing.assert_allclose(now.ravel(), [opened(0, [0, 1, 2, 3]), opened(1, [0, 1]), opened(2, [2])], rtol=1e-5)


def test_without_a_mask_all_tokens_are_real():
    now = gate_value(X, LEAVES, None)
    assert now.shape == (3, 1, 1)
    np.testing.assert_allclose(now.ravel(), [opened(row, [0, 1, 2, 3]) for row in range(3)], rtol=1e-5)


def test_tokens_before_the_mask_are_prompts_and_real():
    now = gate_value(X, LEAVES, jnp.array([[1, 1], [1, 0], [0, 0]]))
    np.testing.assert_allclose(
        now.ravel(), [opened(0, [0, 1, 2, 3]), opened(1, [0, 1, 2]), opened(2, [0, 1])], rtol=1e-5
    )


def test_a_row_of_padding_is_closed_and_has_gradients():
    mask = jnp.zeros((3, 4), int)
    value, grad = jax.value_and_grad(lambda leaves: gate_value(X, leaves, mask).sum())(LEAVES)
    assert value == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))


def test_many_tokens_in_bfloat16():
    x = jnp.ones((1, 1000, 2), jnp.bfloat16)
    leaves = {"kernel": jnp.zeros((2, 1)), "bias": jnp.array([1.0])}
    now = gate_value(x, leaves, None)
    assert now.dtype == jnp.bfloat16
    assert float(now[0, 0, 0]) == pytest.approx(0.7311, abs=3e-3)


def test_fresh_leaves(key):
    leaves = gate_leaves(2000, key)
    assert jax.tree.map(jnp.shape, leaves) == {"kernel": (2000, 1), "bias": (1,)}
    assert float(leaves["kernel"].std()) == pytest.approx(0.02, rel=0.1)
    assert not leaves["bias"].any()


def test_in_double_precision_nothing_is_rounded_to_single():
    with jax.enable_x64(True):
        double = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in LEAVES.items()}
        now = gate_value(jnp.asarray(np.asarray(X, np.float64)), double, None)
        assert now.dtype == jnp.float64
        kernel, bias = (np.asarray(LEAVES[name], np.float64) for name in ("kernel", "bias"))
        z = np.asarray(X, np.float64) @ kernel + bias
        np.testing.assert_allclose(now[:, 0, 0], (1 / (1 + np.exp(-z))).mean((1, 2)), rtol=1e-14)
