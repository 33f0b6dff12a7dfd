"""Chains, init, merge and fold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import (
    PARAMS,
    SITES,
    X,
    by_hand,
    leaves_of,
    run,
    scaled,
    shifted,
)

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.transform import Transform


def test_a_chain_of_something_else():
    with pytest.raises(jpeft.UserError, match="takes transforms, such as jpeft"):
        jpeft.chain("lora")


def test_instances_count_each_method():
    method = jpeft.chain(scaled(), jpeft.chain(shifted(), scaled()), jpeft.chain())
    assert list(jpeft.instances(method)) == ["scaled_0", "shifted_0", "scaled_1"]
    assert [t.name for t in method.members] == ["scaled", "shifted", "scaled"]
    assert list(jpeft.instances(scaled())) == ["scaled_0"]


@pytest.mark.parametrize("jit", [False, True])
def test_the_later_one_wraps_the_earlier_one(jit):
    # Names that sort the other way round: a traced dict comes back sorted.
    for method, wanted in (
        (jpeft.chain(scaled(), shifted()), lambda y, scale, shift: y * scale + shift),
        (jpeft.chain(shifted(), scaled()), lambda y, scale, shift: (y + shift) * scale),
    ):
        leaves = leaves_of(method)
        fn = jax.jit(run, static_argnums=0) if jit else run

        def at_proj(path, x, y, leaves=leaves, wanted=wanted):
            return wanted(y, np.asarray(leaves["scaled_0"][path]["v"]), np.asarray(leaves["shifted_0"][path]["v"]))

        np.testing.assert_allclose(fn(method, leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)


def test_a_method_twice_in_a_chain():
    method = jpeft.chain(scaled(), shifted(), scaled(layers=[1]))
    leaves = leaves_of(method)

    def at_proj(path, x, y):
        v = {name: np.asarray(own[path]["v"]) for name, own in leaves.items() if path in own}
        return (y * v["scaled_0"] + v["shifted_0"]) * v.get("scaled_1", 1.0)

    np.testing.assert_allclose(run(method, leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)


def test_init_depends_on_nothing_else_in_the_chain_and_on_no_other_layer(key):
    alone = jpeft.init(scaled(), key, SITES)
    chained = jpeft.init(jpeft.chain(shifted(), scaled()), key, SITES)
    chex.assert_trees_all_equal(alone["scaled_0"], chained["scaled_0"])
    one = jpeft.init(scaled(layers=[1]), key, SITES)
    assert list(one["scaled_0"]) == ["blocks_1/proj"]
    np.testing.assert_array_equal(one["scaled_0"]["blocks_1/proj"]["v"], alone["scaled_0"]["blocks_1/proj"]["v"])


def test_init_differs_by_site_instance_and_key(key):
    leaves = jpeft.init(jpeft.chain(scaled(), scaled(), shifted()), key, SITES)
    other = jpeft.init(scaled(), jax.random.key(1), SITES)
    drawn = [tuple(map(float, x[0])) for x in jax.tree.leaves((leaves, other))]
    assert len(set(drawn)) == len(drawn) == 8


def test_init_hands_over_the_parameters(key):
    given = []
    method = Transform("spy", lambda key, sites, params: given.append(params) or {}, None)
    jpeft.init(method, key, SITES, PARAMS)
    jpeft.init(method, key, SITES)
    assert given[0] is PARAMS
    assert given[1] is None


# Merging and folding.


def merge_shift(leaves, params):
    for path, own in leaves.items():
        params = tree.replace(params, f"{path}/bias", lambda b, own=own: b + own["v"][0])
    return params


@pytest.mark.parametrize("jit", [False, True])
def test_without_a_wrap_the_leaves_are_merged_in_the_forward_pass(jit):
    method = jpeft.chain(shifted(merge=merge_shift)._replace(wrap=None), scaled())
    leaves = leaves_of(method)
    fn = jax.jit(lambda leaves: run(method, leaves)) if jit else lambda leaves: run(method, leaves)

    def at_proj(path, x, y):
        return (y + np.asarray(leaves["shifted_0"][path]["v"])) * np.asarray(leaves["scaled_0"][path]["v"])

    np.testing.assert_allclose(fn(leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)
    grads = jax.grad(lambda leaves: (run(method, leaves) ** 2).sum())(leaves)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_merge_leaves_the_base_untouched_and_returns_the_rest():
    """The rest is numbered anew, so its leaves must be too."""
    method = jpeft.chain(shifted(layers=[0], merge=merge_shift), scaled(), shifted(layers=[1]))
    leaves = leaves_of(method)
    before = jax.tree.leaves(PARAMS)
    copies = [np.array(x) for x in before]
    merged = jpeft.merge(method, leaves, PARAMS)
    assert all(x is y for x, y in zip(jax.tree.leaves(PARAMS), before, strict=True))
    assert all(x.tobytes() == np.asarray(y).tobytes() for x, y in zip(copies, before, strict=True))
    assert list(jpeft.instances(merged.transform)) == list(merged.leaves) == ["scaled_0", "shifted_0"]
    assert merged.leaves["shifted_0"] is leaves["shifted_1"]
    assert merged.params["out"]["kernel"] is PARAMS["out"]["kernel"]
    assert merged.params["blocks_0"]["proj"]["bias"] is not PARAMS["blocks_0"]["proj"]["bias"]
    now = run(merged.transform, merged.leaves, params=merged.params)
    np.testing.assert_allclose(now, run(method, leaves), rtol=1e-5, atol=1e-6)


def test_leaves_of_another_transform_are_refused():
    one, two = scaled(), jpeft.chain(scaled(merge=merge_scale), shifted())
    leaves = leaves_of(one)
    told = r"leaves of \['scaled_0'\] do not fit a transform with \['scaled_0', 'shifted_0'\]"
    for use in (lambda: jpeft.merge(two, leaves, PARAMS), lambda: jpeft.fold(two, leaves), lambda: run(two, leaves)):
        with pytest.raises(UserError, match=told):
            use()


def test_fold():
    method = jpeft.chain(scaled(fold=lambda leaves: {path: {"v": 2 * own["v"]} for path, own in leaves.items()}),
                         shifted())  # fmt: skip
    leaves = leaves_of(method)
    folded = jpeft.fold(method, leaves)
    assert list(folded) == ["scaled_0", "shifted_0"]
    assert folded["shifted_0"] is leaves["shifted_0"]
    for path, own in leaves["scaled_0"].items():
        np.testing.assert_array_equal(folded["scaled_0"][path]["v"], 2 * own["v"])


def merge_scale(leaves, params):
    for path, own in leaves.items():
        params = tree.replace(params, f"{path}/kernel", lambda w, own=own: w * own["v"])
        params = tree.replace(params, f"{path}/bias", lambda b, own=own: b * own["v"][0])
    return params


def same_when_merged(method, staying):
    leaves = leaves_of(method)
    assert jpeft.core.transform.stays(method, leaves) == staying
    merged = jpeft.merge(method, leaves, PARAMS)
    assert len(merged.transform.members) == len(staying)
    now = run(merged.transform, merged.leaves, params=merged.params)
    np.testing.assert_allclose(now, run(method, leaves), rtol=1e-5, atol=1e-5)


def test_what_has_no_wrap_is_merged_first_as_it_acts_first():
    """The scale written before the shift acts after it, since the shift is part of the parameters."""
    same_when_merged(jpeft.chain(scaled(merge=merge_scale), shifted(merge=merge_shift)._replace(wrap=None)), [])


def test_what_wraps_a_member_that_stays_is_not_merged():
    """At another site it is; and what is wrapped by one that stays is, too."""
    shift, scale = shifted(layers=[0]), scaled(merge=merge_scale)
    same_when_merged(jpeft.chain(shift, scale), ["shifted_0", "scaled_0"])
    same_when_merged(jpeft.chain(scale, shift), ["shifted_0"])
    same_when_merged(jpeft.chain(shift, scaled(layers=[1], merge=merge_scale)), ["shifted_0"])


def test_rates_are_those_of_the_instance():
    halved = scaled()._replace(rate=lambda path: 0.5 if path == ("blocks_1/proj", "v") else 2.0)
    rate = jpeft.core.partition.rates(jpeft.chain(scaled(), shifted(), halved))
    assert rate(("scaled_0", "blocks_1/proj", "v")) == 1.0
    assert rate(("scaled_1", "blocks_1/proj", "v")) == 0.5
    assert rate(("scaled_1", "blocks_0/proj", "v")) == 2.0
