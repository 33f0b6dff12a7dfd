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
from jpeft.transforms.krona import krona

TARGETS = "query|value|intermediate|ffn/output|pooler"


def kronecker(a, b):
    """A kron B entry by entry."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    out = np.zeros((a1 * b1, a2 * b2))
    for i in range(a1 * b1):
        for j in range(a2 * b2):
            out[i, j] = a[i // b1, j // b2] * b[i % b1, j % b2]
    return out


@pytest.mark.parametrize("shape", [None, (2, 4)])
def test_equals_the_materialised_weight_and_the_merged_one(toy, key, shape):
    method = krona(shape, 1.5, targets=TARGETS)
    leaves = randomised(jpeft.init(method, key, toy.sites), scale=0.6)
    assert len(leaves["krona_0"]) == 2 * 4 + 1
    flat = tree.flatten(toy.params)
    for path, own in leaves["krona_0"].items():
        at = (*path.split("/"), "kernel")
        a, b = (np.asarray(own[name], np.float64) for name in "ab")
        flat[at] = jnp.asarray(flat[at] + 1.5 * kronecker(a, b), jnp.float32)
    now = toy.logits(method, leaves)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.05
    np.testing.assert_allclose(now, toy.logits(jpeft.chain(), {}, tree.unflatten(flat)), atol=1e-5)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.transform.members == ()
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_allclose(x, flat[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, merged.params), now, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.usefixtures("optimised")
def test_a_fresh_one_leaves_the_logits_bit_identical(toy, key, jit):
    method = krona(targets=TARGETS)
    leaves = jpeft.init(method, key, toy.sites)
    compiled = jax.jit if jit else lambda f: f
    now = compiled(lambda leaves: toy.logits(method, leaves))(leaves)
    np.testing.assert_array_equal(now, compiled(lambda: toy.logits(jpeft.chain(), {}))())


@pytest.mark.parametrize(
    ("size", "a", "b"),
    [((768, 768), (32, 24), (24, 32)), ((768, 3072), (32, 48), (24, 64)), ((7, 10), (7, 2), (1, 5))],
)
def test_the_default_shape_has_the_fewest_parameters(key, size, a, b):
    x, kernel = jax.ShapeDtypeStruct((1, size[0]), "float32"), jax.ShapeDtypeStruct(size, "float32")
    out = jax.ShapeDtypeStruct((1, size[1]), "float32")
    sites = {"query": Site("query", None, "Dense", {"kernel": kernel}, (x,), out)}
    own = jpeft.init(krona(), key, sites)["krona_0"]["query"]
    assert own["a"].shape == a
    assert own["b"].shape == b
    assert not own["b"].any()
    bound = a[0] ** -0.5
    assert 0.8 * bound < float(jnp.abs(own["a"]).max()) <= bound


def test_dropout_falls_on_what_goes_into_the_product(key):
    method = krona((1, 1), 1.0, dropout=0.25)
    leaves = {"a": jnp.ones((1, 1)), "b": jnp.eye(40)}
    x = jnp.full((50, 40), 3.0)
    site = Site("query", None, "Dense", {}, ())

    def added(key):
        return method.wrap(leaves, site, lambda x: 5 * x, (x,), Context(True, key, None, {}, {})) - 5 * x

    assert set(np.unique(np.round(added(key), 4))) == {np.float32(0.0), np.float32(4.0)}
    assert float((added(key) == 0).mean()) == pytest.approx(0.25, abs=0.04)
    np.testing.assert_array_equal(added(None), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"shape": (2, 0)}, r"shape\[1\] must be positive, got 0"),
        ({"shape": (2, 2, 2)}, "shape must be two numbers"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        krona(**options)


def test_a_shape_that_does_not_divide(toy, key):
    with pytest.raises(UserError, match=r"shape \(3, 4\) does not divide \(16, 16\)"):
        jpeft.init(krona((3, 4)), key, toy.sites)


def test_the_layers_that_it_is_in(toy, key):
    leaves = jpeft.init(krona(targets="query", layers=[1]), key, toy.sites)
    assert list(leaves["krona_0"]) == ["encoder/layer_1/attention/query"]
