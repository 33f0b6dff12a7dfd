"""AdaMix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised
from scipy.special import softmax

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.site import Site
from jpeft.core.transform import Context
from jpeft.transforms.adamix import adamix, consistency

SITE = Site("encoder/layer_0/ffn_add_norm", 0, "AddNorm", {}, ())


def draw(experts=3):
    shapes = {"down": {"kernel": (experts, 6, 4), "bias": (experts, 4)}, "up": {"kernel": (4, 6), "bias": (6,)}}
    return randomised(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)), 4, 0.7)


def at_site(leaves, hidden, residual, key=None, site=SITE):
    ctx = Context(key is not None, key, None, {}, {})
    return adamix(3, activation="relu").wrap(leaves, site, lambda h, r: 2 * h + r, (hidden, residual), ctx)


def by_hand(leaves, hidden, residual, kernel, bias):
    """The adapter with one `down`."""
    hidden, residual = np.asarray(hidden), np.asarray(residual)
    inner = np.maximum(hidden @ kernel + bias, 0)
    return 2 * (hidden + inner @ np.asarray(leaves["up"]["kernel"]) + np.asarray(leaves["up"]["bias"])) + residual


def test_one_expert_a_training_step_and_the_mean_weights_otherwise():
    leaves = draw()
    hidden, residual = jax.random.normal(jax.random.key(0), (2, 5, 4, 6))
    kernel, bias = (np.asarray(leaves["down"][name], np.float64) for name in ("kernel", "bias"))
    mean = by_hand(leaves, hidden, residual, kernel.mean(0), bias.mean(0))
    np.testing.assert_allclose(at_site(leaves, hidden, residual), mean, rtol=1e-4, atol=1e-5)
    single = np.stack([by_hand(leaves, hidden, residual, kernel[e], bias[e]) for e in range(3)])
    step = jax.jit(lambda key: at_site(leaves, hidden, residual, key))
    seen = []
    for i in range(45):
        off = np.abs(np.asarray(step(jax.random.key(i))) - single).max((1, 2, 3))
        assert np.sort(off)[0] < 1e-4 < 1e-2 < np.sort(off)[1]  # the same expert for the whole batch
        seen.append(int(off.argmin()))
    assert np.bincount(seen, minlength=3).min() >= 6


def test_layers_draw_apart():
    leaves = draw()
    hidden, residual = jax.random.normal(jax.random.key(0), (2, 1, 2, 6))
    other = SITE._replace(path="encoder/layer_1/ffn_add_norm", layer=1)
    same = 0
    for i in range(30):
        now = [at_site(leaves, hidden, residual, jax.random.key(i), site) for site in (SITE, other)]
        same += bool(np.allclose(*now))
    assert 2 <= same <= 20


def test_experts_start_alike_and_share_up(toy, key):
    leaves = jpeft.init(adamix(5, 3), key, toy.sites)["adamix_0"]
    assert set(leaves) == {f"encoder/layer_{i}/ffn_add_norm" for i in (0, 1)}
    for own in leaves.values():
        assert jax.tree.map(jnp.shape, own) == {
            "down": {"kernel": (5, 16, 3), "bias": (5, 3)}, "up": {"kernel": (3, 16), "bias": (16,)},
        }  # fmt: skip
        assert (own["down"]["kernel"] == own["down"]["kernel"][:1]).all()
        assert float(own["down"]["kernel"].std()) > 0.01
    first, second = (own["down"]["kernel"] for own in leaves.values())
    assert float(jnp.abs(first - second).max()) > 1e-3


def test_folding_drops_the_axis_of_the_experts_and_changes_nothing(toy, key):
    method = adamix(4, 3)
    leaves = randomised(jpeft.init(method, key, toy.sites))
    folded = jpeft.fold(method, leaves)
    for own in folded["adamix_0"].values():
        assert own["down"]["kernel"].shape == (16, 3)
        assert own["down"]["bias"].shape == (3,)
    now = toy.logits(method, leaves)
    np.testing.assert_allclose(toy.logits(method, folded), now, atol=1e-5)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.01
    again = jpeft.fold(method, folded)  # folding twice is folding once
    np.testing.assert_array_equal(toy.logits(method, again), toy.logits(method, folded))
    trained = [toy.logits(method, folded, train=True, rngs={"dropout": jax.random.key(1)}) for _ in range(2)]
    np.testing.assert_array_equal(*trained)


def test_the_penalty_is_half_the_symmetric_divergence():
    first, second = jax.random.normal(jax.random.key(0), (2, 5, 3)) * 2
    p, q = (softmax(np.asarray(x, np.float64), -1) for x in (first, second))
    wanted = 0.5 * (p * np.log(p / q) + q * np.log(q / p)).sum(-1)
    assert wanted.min() > 0.01
    np.testing.assert_allclose(consistency(first, lambda: second), wanted, rtol=1e-4)
    np.testing.assert_allclose(consistency(first, lambda: first), 0.0, atol=1e-6)


def test_gradients_of_the_penalty_take_targets_as_given():
    """d/dx KL(t || softmax(x)) = softmax(x) - t, and nothing through t."""
    first, second = jax.random.normal(jax.random.key(0), (2, 5, 3)) * 2
    grads = jax.grad(lambda a, b: consistency(a, lambda: b).sum(), (0, 1))(first, second)
    p, q = (softmax(np.asarray(x, np.float64), -1) for x in (first, second))
    np.testing.assert_allclose(grads[0], 0.5 * (p - q), atol=1e-5)
    np.testing.assert_allclose(grads[1], 0.5 * (q - p), atol=1e-5)


def test_the_penalty_of_a_single_logit():
    first, second = jnp.array([[1.0], [-2.0]]), jnp.array([[0.5], [1.0]])
    np.testing.assert_allclose(consistency(first, lambda: second), [0.125, 4.5])
    grads = jax.grad(lambda a, b: consistency(a, lambda: b).sum(), (0, 1))(first, second)
    np.testing.assert_allclose(grads[0], [[0.25], [-1.5]])
    np.testing.assert_allclose(grads[1], [[-0.25], [1.5]])


def test_the_penalty_is_the_transforms():
    assert adamix().penalty is consistency


def test_errors(toy, key):
    with pytest.raises(UserError, match="experts must be positive, got 0"):
        adamix(0)
    with pytest.raises(UserError, match="bottleneck must be positive"):
        adamix(bottleneck=-1)
    with pytest.raises(UserError, match="activation 'gleu' is unknown: did you mean 'gelu'"):
        adamix(activation="gleu")
    with pytest.raises(UserError, match="matches no site"):
        jpeft.init(adamix(targets="fnn"), key, toy.sites)
