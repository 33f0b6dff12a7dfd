"""Gains from gradients: against plain loops, and against what one step of Adam really does to a held-out loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core.errors import UserError
from jpeft.plans import gains
from jpeft.plans.gains import Moments


def quadratic(seed, n, d=30, noise=1.0):
    """Gradients [n, d] of single examples around a common mean."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(size=d)
    return common + noise * rng.normal(size=(n, d))


def of(gradients):
    return Moments({"x": gradients.mean(0)}, {"x": (gradients**2).mean(0)}, len(gradients))


def test_moments_are_those_of_a_loop():
    fn = lambda tree, x: jnp.sum(jnp.tanh(tree["w"] @ x)) + tree["b"] * x[0]
    tree, xs = {"w": jnp.ones((2, 3)), "b": jnp.float32(0.5)}, np.random.default_rng(0).normal(size=(7, 3))
    found = gains.moments(jpeft.fisher(fn, tree, jnp.asarray(xs, jnp.float32), values="moments"), 7)
    each = [jax.grad(fn)(tree, jnp.asarray(x, jnp.float32)) for x in xs]
    for name in tree:
        stacked = np.stack([np.asarray(g[name]) for g in each])
        np.testing.assert_allclose(found.mean[name], stacked.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.square[name], (stacked**2).mean(0), rtol=1e-5, atol=1e-7)


def test_moments_of_rows_that_are_looked_up():
    fn = lambda table, ids: jnp.sum(table[ids] ** 3)
    table, ids = jnp.arange(24.0).reshape(8, 3) / 10, np.array([[0, 1, 1], [5, 0, 2]])
    mean, square = jpeft.fisher(fn, table, jnp.asarray(ids), values="moments")
    each = np.stack([np.asarray(jax.grad(fn)(table, row)) for row in ids])
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-6)
    np.testing.assert_allclose(square, (each**2).mean(0), rtol=1e-6)


def test_together_are_the_moments_of_all():
    a, b = quadratic(0, 10), quadratic(1, 30)
    both, found = of(np.concatenate([a, b])), gains.together(of(a), of(b))
    np.testing.assert_allclose(found.mean["x"], both.mean["x"])
    np.testing.assert_allclose(found.square["x"], both.square["x"])
    assert found.n == 40


def test_the_gain_of_a_step_is_what_adam_gains():
    """One update of Adam on a linear loss, from the moments that many batches would have built up."""
    a, b, rate, batch_size = quadratic(0, 4000), quadratic(1, 4000), 1e-3, 16
    gain = gains.adam_step(of(a), of(b), lambda path: rate, batch_size)["x"].sum()
    rng, state = np.random.default_rng(2), (optimizer := optax.scale_by_adam(b1=0.0, b2=0.999)).init(np.zeros(30))
    steps = []
    for _ in range(3000):
        update, state = optimizer.update(a[rng.integers(0, len(a), batch_size)].mean(0).astype(np.float32), state)
        steps.append(rate * np.asarray(update))
    assert gain == pytest.approx((np.mean(steps[1000:], axis=0) * b.mean(0)).sum(), rel=0.05)


def test_what_is_noise_gains_nothing_on_average():
    noise = [np.random.default_rng(seed).normal(size=(64, 30)) for seed in range(200)]
    found = [
        gains.adam_step(of(x), of(y), lambda path: 1.0, 16)["x"].sum()
        for x, y in zip(noise[::2], noise[1::2], strict=True)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 10
    assert gains.trace(of(noise[0]))["x"].sum() == pytest.approx(30, rel=0.1)  # which the trace cannot see


def test_the_rate_is_that_of_the_leaf():
    a = {"lora_0": {"encoder/layer_0/query": {"a": np.ones(2), "b": np.ones(2)}}}
    half = Moments(a, a, 8)
    found = gains.adam_step(half, half, lambda path: 3.0 if path[-1] == "b" else 1.0, 16)
    site = found["lora_0"]["encoder/layer_0/query"]
    np.testing.assert_allclose(site["b"], 3 * site["a"])


def test_layers_share_what_is_shared():
    entries = {
        "prefix_0": {
            "shared": {"mlp": np.full(3, 2.0)},
            "encoder/layer_0/attention/core": {"key": np.ones(2)},
            "encoder/layer_4/attention/core": {"key": np.full(2, 5.0)},
        }
    }
    assert gains.by_layer(entries) == {0: 2 + 3, 4: 10 + 3}
    with pytest.raises(UserError, match="lora_0 has leaves at 'pooler', which is not in a layer"):
        gains.by_layer({"lora_0": {"pooler": {"a": np.ones(1)}}})
