import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.core.site import Site
from jpeft.core.transform import Context
from jpeft.transforms.pissa import pissa

TARGETS = "query|value|intermediate|ffn/output|pooler"


def moved(method, toy, key):
    """Leaves as after training: those that train are random, the fixed ones are as `init` made them."""
    trained, fixed = split(jpeft.init(method, key, toy.sites, toy.params))
    return tree.union(randomised(trained), fixed)


def test_starts_from_the_best_approximation(toy, key):
    rank, alpha = 3, 12.0
    leaves = jpeft.init(pissa(rank, alpha, targets=TARGETS), key, toy.sites, toy.params)["pissa_0"]
    for path, own in leaves.items():
        w = np.asarray(tree.flatten(toy.params)[(*path.split("/"), "kernel")], np.float64)
        u, s, v = np.linalg.svd(w)
        best = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(rank))
        np.testing.assert_allclose(alpha / rank * own["a"] @ own["b"], best, atol=1e-4)
        np.testing.assert_allclose(own["a"].T @ own["a"], np.diag(s[:rank] * rank / alpha), atol=1e-4)  # half each
        np.testing.assert_allclose(own["b"] @ own["b"].T, np.diag(s[:rank] * rank / alpha), atol=1e-4)
        for name in "ab":
            np.testing.assert_array_equal(own["fixed"][name], own[name])
            assert own["fixed"][name] is not own[name]  # a step that is given `a` to overwrite must not reach this


def test_a_fresh_one_leaves_the_logits_unchanged(toy, key):
    method = pissa(4, targets=TARGETS)
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    np.testing.assert_allclose(toy.logits(method, leaves), toy.logits(jpeft.chain(), {}), atol=1e-6)


def test_equals_the_papers_residual_weight_and_the_merged_one(toy, key):
    method = pissa(3, 12.0, targets=TARGETS)
    leaves = moved(method, toy, key)
    flat = tree.flatten(toy.params)
    for path, own in leaves["pissa_0"].items():
        at = (*path.split("/"), "kernel")
        w = np.asarray(flat[at], np.float64)
        u, s, v = np.linalg.svd(w, full_matrices=False)
        residual = (u[:, 3:] * s[3:]) @ v[3:]
        a, b = (np.asarray(own[name], np.float64) for name in "ab")
        flat[at] = jnp.asarray(residual + 4.0 * a @ b, jnp.float32)
    now = toy.logits(method, leaves)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.05
    np.testing.assert_allclose(now, toy.logits(jpeft.chain(), {}, tree.unflatten(flat)), atol=3e-5)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.transform.members == ()
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, merged.params), now, atol=1e-5)


def test_gradients_are_those_of_the_plain_product(key):
    a, b, x, g = (
        jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 4), [(5, 2), (2, 4), (3, 5), (3, 4)], strict=True)
    )
    fixed = {"a": a + 1.0, "b": b - 0.5}
    site, ctx = Site("query", None, "Dense", {}, ()), Context(False, None, None, {}, {})

    def loss(own):
        out = pissa(2, 6.0).wrap({**own, "fixed": fixed}, site, lambda x: jnp.zeros((3, 4)), (x,), ctx)
        return (g * out).sum()

    grads = jax.grad(loss)({"a": a, "b": b})
    np.testing.assert_allclose(grads["a"], 3 * x.T @ g @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["b"], 3 * (x @ a).T @ g, rtol=1e-4, atol=1e-4)


def test_small_changes_survive_bfloat16(key):
    """The update of a slightly moved PiSSA is right to bfloat16's own 1 %, although A B alone has an error like it."""
    w = jax.random.normal(key, (64, 64))
    u, s, v = np.linalg.svd(np.asarray(w), full_matrices=False)
    start = {"a": jnp.asarray(u[:, :4] * np.sqrt(s[:4])), "b": jnp.asarray(np.sqrt(s[:4])[:, None] * v[:4])}
    own = {name: x + 1e-3 for name, x in start.items()} | {"fixed": start}
    x = jax.random.normal(jax.random.key(9), (8, 64))
    site, ctx = Site("query", None, "Dense", {}, ()), Context(False, None, None, {}, {})

    def zero(x):
        return jnp.zeros((8, 64), x.dtype)

    now = pissa(4, 4.0).wrap(own, site, zero, (x.astype(jnp.bfloat16),), ctx)
    a, b, a0, b0 = (np.asarray(z, np.float64) for z in (own["a"], own["b"], start["a"], start["b"]))
    wanted = np.asarray(x, np.float64) @ (a @ b - a0 @ b0)
    assert now.dtype == jnp.bfloat16
    assert np.linalg.norm(now - wanted) < 0.02 * np.linalg.norm(wanted)


def test_ranks_by_pattern_and_a_rank_too_large(toy, key):
    leaves = jpeft.init(pissa(2, rank_pattern={"layer_1/.*": 5}), key, toy.sites, toy.params)["pissa_0"]
    assert leaves["encoder/layer_0/attention/query"]["fixed"]["a"].shape == (16, 2)
    assert leaves["encoder/layer_1/attention/query"]["b"].shape == (5, 16)
    with pytest.raises(UserError, match=r"rank 17 at 'encoder/layer_0/attention/query'.* has 16 singular values"):
        jpeft.init(pissa(17), key, toy.sites, toy.params)


def test_it_wants_the_parameters(toy, key):
    with pytest.raises(UserError, match="starts from the model's parameters"):
        jpeft.init(pissa(), key, toy.sites)
