"""(IA)3."""

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
from jpeft.transforms.ia3 import ia3

PLACES = {"after": "ffn/output", "before": "ffn/intermediate"}
PEFT = "key|value|attention/output|ffn/output"  # the default targets of Hugging Face peft for BERT


@pytest.mark.parametrize(("name", "at_input"), [("output", True), ("intermediate", False), ("key", False)])
def test_at_its_site(name, at_input):
    x, kernel, bias = (
        np.asarray(jax.random.normal(jax.random.key(i), s)) for i, s in enumerate([(2, 3, 4), (4, 5), (5,)])
    )
    scale = np.asarray(jax.random.normal(jax.random.key(3), (4 if at_input else 5,)))
    site, ctx = Site(f"layer_0/ffn/{name}", 0, "Dense", {}, ()), Context(False, None, None, {}, {})
    call = lambda x: jnp.asarray(np.asarray(x) @ kernel + bias)
    now = ia3().wrap({"scale": jnp.asarray(scale)}, site, call, (jnp.asarray(x),), ctx)
    wanted = (x * scale) @ kernel + bias if at_input else (x @ kernel + bias) * scale
    np.testing.assert_allclose(now, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("placement", PLACES)
def test_places_and_shapes(toy, key, placement):
    leaves = jpeft.init(ia3(placement), key, toy.sites)["ia3_0"]
    ends = {"attention/key": 16, "attention/value": 16, PLACES[placement]: 24}
    assert {path: own["scale"].shape for path, own in leaves.items()} == {
        f"encoder/layer_{i}/{end}": (n,) for i in (0, 1) for end, n in ends.items()
    }
    assert all((own["scale"] == 1).all() and own["scale"].dtype == jnp.float32 for own in leaves.values())
    one = jpeft.init(ia3(placement, layers=[1]), key, toy.sites)["ia3_0"]
    assert set(one) == {f"encoder/layer_1/{end}" for end in ends}


@pytest.mark.parametrize("options", [{"placement": "after"}, {"placement": "before"}, {"targets": PEFT}])
@pytest.mark.usefixtures("optimised")
def test_a_fresh_one_leaves_the_logits_bit_identical(toy, key, options):
    method = ia3(**options)
    np.testing.assert_array_equal(toy.logits(method, jpeft.init(method, key, toy.sites)), toy.logits(jpeft.chain(), {}))


@pytest.mark.parametrize("options", [{"placement": "after"}, {"placement": "before"}, {"targets": PEFT}])
def test_equals_scaled_weights_and_the_merged_ones(toy, key, options):
    method = ia3(**options)
    leaves = randomised(jpeft.init(method, key, toy.sites), scale=0.8)
    flat = tree.flatten(toy.params)
    for path, own in leaves["ia3_0"].items():
        kernel, bias = ((*path.split("/"), name) for name in ("kernel", "bias"))
        scale = np.asarray(own["scale"], np.float64)
        if path.endswith("output"):
            flat[kernel] = np.diag(scale) @ np.asarray(flat[kernel])
        else:
            flat[kernel], flat[bias] = np.asarray(flat[kernel]) @ np.diag(scale), np.asarray(flat[bias]) * scale
    wanted = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree.unflatten(flat))
    now = toy.logits(method, leaves)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.05
    np.testing.assert_allclose(now, toy.logits(jpeft.chain(), {}, params=wanted), atol=1e-5)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.leaves == {}
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_allclose(x, tree.flatten(wanted)[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(toy.logits(merged.transform, {}, params=merged.params), now, atol=1e-5)


def test_the_two_placements_are_two_methods(toy, key):
    """Before and after the activation differ, with the same vectors."""
    made = {place: jpeft.init(ia3(place), key, toy.sites) for place in PLACES}
    vector = jax.random.normal(jax.random.key(1), (24,))
    for place, leaves in made.items():
        for path, own in leaves["ia3_0"].items():
            if path.endswith(PLACES[place]):
                own["scale"] = vector
    logits = [toy.logits(ia3(place), leaves) for place, leaves in made.items()]
    assert np.abs(logits[0] - logits[1]).max() > 0.01


def test_the_dtype_is_that_of_the_activations():
    site, ctx = Site("layer_0/key", 0, "Dense", {}, ()), Context(False, None, None, {}, {})
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert ia3().wrap({"scale": jnp.ones(3)}, site, lambda x: x, (x,), ctx).dtype == jnp.bfloat16


def test_errors(toy, key):
    with pytest.raises(UserError, match="placement 'afetr' is unknown: did you mean 'after'"):
        ia3("afetr")
    with pytest.raises(UserError, match="matches no site"):
        jpeft.init(ia3(targets="keys"), key, toy.sites)
    with pytest.raises(UserError, match="Dense"):
        jpeft.init(ia3(targets="attention/core"), key, toy.sites)
