import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.site import Site
from jpeft.core.transform import Context
from jpeft.transforms.dora import dora

TARGETS = "query|value|intermediate|ffn/output|pooler"


def turned(kernel, own, scale):
    """W' m / |W'| column by column, in NumPy's float64."""
    w, a, b, m = (np.asarray(x, np.float64) for x in (kernel, own["a"], own["b"], own["magnitude"]))
    w = w + scale * a @ b
    return np.stack([w[:, j] * m[j] / np.sqrt((w[:, j] ** 2).sum()) for j in range(w.shape[1])], axis=1)


def test_equals_the_materialised_weight_and_the_merged_one(toy, key):
    method = dora(3, 12.0, targets=TARGETS)
    leaves = randomised(jpeft.init(method, key, toy.sites, toy.params))
    assert len(leaves["dora_0"]) == 2 * 4 + 1
    flat = tree.flatten(toy.params)
    for path, own in leaves["dora_0"].items():
        at = (*path.split("/"), "kernel")
        flat[at] = jnp.asarray(turned(flat[at], own, 4.0), jnp.float32)
    now = toy.logits(method, leaves)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.05
    np.testing.assert_allclose(now, toy.logits(jpeft.chain(), {}, tree.unflatten(flat)), atol=1e-5)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.transform.members == ()
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_allclose(x, flat[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, merged.params), now, atol=1e-5)


def test_a_fresh_one_has_the_norms_of_the_columns_and_changes_nothing(toy, key):
    method = dora(2)
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    own = leaves["dora_0"]["encoder/layer_1/attention/value"]
    kernel = np.asarray(toy.params["encoder"]["layer_1"]["attention"]["value"]["kernel"])
    np.testing.assert_allclose(own["magnitude"], np.sqrt((kernel**2).sum(0)), rtol=1e-6)
    assert jax.tree.map(jnp.shape, own) == {"a": (16, 2), "b": (2, 16), "magnitude": (16,)}
    np.testing.assert_array_equal(toy.logits(method, leaves), toy.logits(jpeft.chain(), {}))
    np.testing.assert_allclose(
        toy.logits(jpeft.chain(), {}, jpeft.merge(method, leaves, toy.params).params),
        toy.logits(jpeft.chain(), {}),
        atol=1e-5,
    )


def one_site(key, bias=True):
    """A Dense layer [5, 4], an input, and the leaves of a DoRA of rank 2 and scale 1.5 there."""
    keys = jax.random.split(key, 6)
    params = {"kernel": jax.random.normal(keys[0], (5, 4))}
    if bias:
        params["bias"] = jax.random.normal(keys[1], (4,))
    own = {
        "a": jax.random.normal(keys[2], (5, 2)),
        "b": jax.random.normal(keys[3], (2, 4)),
        "magnitude": jax.random.normal(keys[4], (4,)),
    }

    def call(own, x):
        site, ctx = Site("query", None, "Dense", {}, ()), Context(False, None, None, params, {})
        offset = params["bias"].reshape(1, 4) if bias else 0.0
        return dora(2, 3.0).wrap(own, site, lambda x: x @ params["kernel"] + offset, (x,), ctx)

    return params, own, jax.random.normal(keys[5], (3, 5)), call


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_is_not_turned(key, bias):
    params, own, x, call = one_site(key, bias)
    wanted = np.asarray(x) @ turned(params["kernel"], own, 1.5) + (np.asarray(params["bias"]) if bias else 0)
    np.testing.assert_allclose(call(own, x), wanted, atol=1e-5)


def test_the_norm_is_a_constant_to_the_gradient(key):
    """The gradient of a loss in which the norms are numbers, against that of the method."""
    params, own, x, call = one_site(key)
    updated = params["kernel"] + 1.5 * own["a"] @ own["b"]
    norms = np.sqrt((np.asarray(updated) ** 2).sum(0))

    def held(own, norms):
        w = params["kernel"] + 1.5 * own["a"] @ own["b"]
        return x @ (w * (own["magnitude"] / norms).reshape(1, 4)) + params["bias"].reshape(1, 4)

    now = jax.grad(lambda own: (call(own, x) ** 3).sum())(own)
    wanted = jax.grad(lambda own: (held(own, jnp.asarray(norms)) ** 3).sum())(own)
    for name in own:
        np.testing.assert_allclose(now[name], wanted[name], rtol=1e-3, atol=1e-3)
    through = jax.grad(
        lambda own: (held(own, jnp.linalg.norm(params["kernel"] + 1.5 * own["a"] @ own["b"], axis=0)) ** 3).sum()
    )(own)
    assert np.abs(through["b"] - now["b"]).max() > 0.1


def test_an_empty_column_gives_no_nan(key):
    params, own, x, call = one_site(key)
    params["kernel"] = params["kernel"].at[:, 1].set(0)
    own = {**own, "b": own["b"].at[:, 1].set(0), "magnitude": own["magnitude"].at[1].set(0)}
    assert np.isfinite(call(own, x)).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(lambda own: call(own, x).sum())(own)))


def test_first_in_a_chain_it_merges_with_what_follows(toy, key):
    method = jpeft.chain(dora(2), jpeft.lora(3))
    leaves = randomised(jpeft.init(method, key, toy.sites, toy.params))
    merged = jpeft.merge(method, leaves, toy.params)
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, merged.params), toy.logits(method, leaves), atol=1e-5)


def test_it_wants_the_parameters(toy, key):
    with pytest.raises(UserError, match="starts from the model's parameters"):
        jpeft.init(dora(), key, toy.sites)
