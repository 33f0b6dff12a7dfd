"""What trains, how fast, and what decays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import UserError
from jpeft.core import tree
from jpeft.core.transform import FIXED


def parts_of(toy, method, key, trains=("classifier",)):
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    return jpeft.partition(method, toy.params, leaves, trains)


def decaying(parts):
    """{path of a leaf below its site: whether it decays}."""
    return {path[2:]: decays for path, decays in tree.flatten(parts.decays["peft"]).items()}


def test_the_parts_are_the_variables(toy, key):
    method = jpeft.pissa(2)
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    parts = jpeft.partition(method, toy.params, leaves, ["classifier"])
    whole = jpeft.union(parts.frozen, parts.trainable)
    assert jax.tree.structure(whole) == jax.tree.structure({"params": toy.params, "peft": leaves})
    assert set(parts.trainable["params"]) == {"classifier"}
    assert not any(FIXED in path for path in tree.flatten(parts.trainable))
    assert all(FIXED in path for path in tree.flatten(parts.frozen["peft"]))
    assert parts.decays["params"] == {"classifier": {"kernel": True, "bias": False}}


def test_a_name_that_params_do_not_have(toy, key):
    with pytest.raises(UserError, match=r"trains names 'clasifier', .*: did you mean 'classifier'"):
        parts_of(toy, jpeft.lora(2), key, "clasifier")


def test_leaves_of_another_method(toy, key):
    leaves = jpeft.init(jpeft.bitfit(), key, toy.sites, toy.params)
    for given, names in ((leaves, r"\['bitfit_0'\]"), ({}, r"\[\]")):
        with pytest.raises(UserError, match=rf"leaves of {names} do not fit a transform with \['lora_0'\]"):
            jpeft.partition(jpeft.lora(2), toy.params, given)


def test_only_kernels_decay_where_leaves_are_stacked(toy, key):
    for method in (jpeft.ladder_side(4), jpeft.adamix(2, 4)):
        found = decaying(parts_of(toy, method, key))
        assert {path for path, decays in found.items() if decays} == {path for path in found if path[-1] == "kernel"}
        assert any(path[-1] in ("bias", "scale") for path in found)


def test_pruned_kernels_decay_and_biases_do_not(toy, key):
    found = decaying(parts_of(toy, jpeft.sparse_adapter(bottleneck=4), key))
    assert {decays for path, decays in found.items() if "kernel" in path} == {True}
    assert {decays for path, decays in found.items() if "bias" in path} == {False}


def test_masked_entries_decay_as_their_parameter_would(toy, key):
    found = decaying(parts_of(toy, jpeft.random_mask(0.3), key))
    assert {(path[0], decays) for path, decays in found.items()} == {
        ("kernel", True), ("bias", False), ("scale", False), ("embedding", True),
    }  # fmt: skip


def test_pissa_without_a_gradient_stays_where_it_starts(toy, key):
    """Its A and B start at part of the base weights, and decay would pull the function away from the base."""
    method = jpeft.pissa(2)
    parts = parts_of(toy, method, key)
    now = decayed(parts, steps=100)
    for a, b in zip(jax.tree.leaves(now["peft"]), jax.tree.leaves(parts.trainable["peft"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (now["params"]["classifier"]["kernel"] != parts.trainable["params"]["classifier"]["kernel"]).all()


def decayed(parts, steps):
    """What weight decay alone leaves of the trainable variables."""
    optimizer = optax.chain(optax.adamw(0.1, weight_decay=0.1, mask=parts.decays), parts.scale)
    zeros, now = jax.tree.map(jnp.zeros_like, parts.trainable), parts.trainable
    state = optimizer.init(now)
    for _ in range(steps):
        updates, state = optimizer.update(zeros, state, now)
        now = optax.apply_updates(now, updates)
    return now


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(5, name="proj")(x), None


def test_the_axis_that_a_scan_adds_does_not_count():
    x = jnp.ones((2, 5))
    params = Deep().init(jax.random.key(0), x)["params"]
    method = jpeft.chain(jpeft.lora(2, targets="proj"), jpeft.ia3(targets="proj"))
    leaves = jpeft.init(method, jax.random.key(1), jpeft.sites(Deep(), x), params)
    found = tree.flatten(jpeft.partition(method, params, leaves).decays["peft"])
    assert {path[-1]: decays for path, decays in found.items()} == {"a": True, "b": True, "scale": False}


def test_lists_of_parameters_are_refused():
    with pytest.raises(UserError, match=r"expected nested dicts of arrays, got a list or tuple at .*\[0\]"):
        jpeft.partition(jpeft.chain(), {"body": [jnp.ones(2), jnp.ones(3)]}, {}, trains="body")
