"""FISH mask, and the masks at random and by magnitude."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised, setting

import jpeft
from jpeft.core import tree
from jpeft.core.partition import split
from jpeft.core.transform import FIXED
from jpeft.transforms.fish import fish
from jpeft.transforms.magnitude_mask import magnitude_mask
from jpeft.transforms.parts.entries import take
from jpeft.transforms.random_mask import random_mask

RATIO = 0.05


def entries(leaves):
    """{(parameter path, flat index)} of all leaves."""
    found = set()
    for (_, path, name, kind, *_), x in tree.flatten(leaves).items():
        if kind == FIXED:
            found |= {(f"{path}/{name}", int(i)) for i in x}
    return found


@pytest.fixture(scope="module")
def gradients(toy):
    """[(p(c), d log p(c) / d params) for each class c] of each of the four rows, one gradient at a time."""

    def log_p(params, ids, mask, c):
        value = jax.nn.log_softmax(toy.model.apply({"params": params}, ids[None], mask[None])[0][0])[c]
        return value, jnp.exp(value)

    grad = jax.jit(jax.grad(log_p, has_aux=True))
    return [
        [grad(toy.params, ids, mask, c)[::-1] for c in range(3)] for ids, mask in zip(toy.ids, toy.mask, strict=True)
    ]


@pytest.mark.parametrize("labels", ["empirical", "expected"])
@pytest.mark.parametrize("values", ["square", "absolute"])
def test_fish_takes_the_largest_of_a_loop(toy, key, gradients, labels, values):
    method = fish(RATIO, num_examples=4, labels=labels, values=values)
    leaves = jpeft.prepare(method, setting(toy, method, key))
    measure = np.square if values == "square" else np.abs
    total = jax.tree.map(lambda x: np.zeros(x.shape), toy.params)
    for own, label in zip(gradients, toy.labels, strict=True):
        for p, grad in own if labels == "expected" else [(1.0, own[int(label)][1])]:
            total = jax.tree.map(lambda t, g, p=p: t + float(p) * measure(np.asarray(g, np.float64)), total, grad)
    body = {path: x for path, x in tree.flatten(total).items() if path[0] != "classifier"}
    budget = int(RATIO * tree.count(toy.params)) - tree.count(toy.params["classifier"])
    everything = np.concatenate([x.ravel() for x in body.values()])
    threshold = np.sort(everything)[-budget]
    chosen = entries(leaves)
    assert len(chosen) == budget
    scores = np.array([tree.flatten(total)[tuple(path.split("/"))].ravel()[i] for path, i in chosen])
    assert scores.min() >= threshold * (1 - 1e-3)  # the same set but for rounding at the border


@pytest.mark.parametrize("make", [fish, random_mask, magnitude_mask])
def test_a_fresh_mask_changes_nothing_and_a_trained_one_only_its_entries(toy, key, make):
    method = make(RATIO)
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    np.testing.assert_array_equal(toy.logits(method, leaves), toy.logits(jpeft.chain(), {}))
    values, fixed = split(leaves)
    leaves = tree.union(randomised(values), fixed)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.leaves == {}
    expected = {path: np.array(x) for path, x in tree.flatten(toy.params).items()}
    for (instance, path, name, kind, *_), index in tree.flatten(fixed).items():
        assert kind == FIXED
        expected[(*path.split("/"), name)].reshape(-1)[index] = leaves[instance][path][name]["values"]
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_array_equal(x, expected[path])
    unmerged = toy.logits(method, leaves)
    np.testing.assert_allclose(unmerged, toy.logits(jpeft.chain(), {}, params=merged.params), atol=1e-5)
    assert np.abs(unmerged - toy.logits(jpeft.chain(), {})).max() > 1e-2


def test_a_random_mask_is_as_large_as_fish_and_its_seed_decides_it(toy, key):
    one = jpeft.init(random_mask(RATIO), key, toy.sites, toy.params)
    two = jpeft.init(random_mask(RATIO), jax.random.key(1), toy.sites, toy.params)
    same = jpeft.init(random_mask(RATIO), key, toy.sites, toy.params)
    assert entries(one) == entries(same) != entries(two)
    assert tree.count(split(one)[0]) == len(entries(one)) == len(entries(two))
    assert len(entries(jpeft.init(fish(RATIO), key, toy.sites, toy.params))) == len(entries(one))


def test_magnitude_takes_the_largest_weights(toy, key):
    chosen = entries(jpeft.init(magnitude_mask(count=151), key, toy.sites, toy.params))
    flat = tree.flatten(toy.params)
    body = np.concatenate([np.abs(x).ravel() for path, x in flat.items() if path[0] != "classifier"])
    assert min(abs(flat[tuple(path.split("/"))].ravel()[i]) for path, i in chosen) == np.sort(body)[-100]
    assert len(chosen) == 100  # less the 51 of the head


@pytest.mark.parametrize("make", [fish, random_mask, magnitude_mask])
def test_nothing_and_everything(toy, key, make):
    """The head alone, whether it counts or not, leaves no entry; the model without an instance's leaves still runs."""
    for method in (make(count=51), make(count=0, head_counts=False)):
        leaves = jpeft.init(method, key, toy.sites, toy.params)
        assert list(leaves.values()) == [{}]
        np.testing.assert_array_equal(toy.logits(method, leaves), toy.logits(jpeft.chain(), {}))
    everything = tree.count(toy.params) - 51
    assert len(entries(jpeft.init(make(count=everything, head_counts=False), key, toy.sites, toy.params))) == everything


def test_all_entries_can_be_chosen(toy, key):
    leaves = jpeft.init(random_mask(1.0), key, toy.sites, toy.params)
    assert tree.count(split(leaves)[0]) == tree.count(toy.params) - tree.count(toy.params["classifier"])


def test_gradients_are_those_of_the_entries(toy, key):
    method = random_mask(RATIO)
    values, fixed = split(jpeft.init(method, key, toy.sites, toy.params))
    got = jax.grad(lambda v: (toy.logits(method, tree.union(v, fixed)) ** 2).sum())(values)
    plain = jax.grad(lambda p: (toy.model.apply({"params": p}, toy.ids, toy.mask)[0] ** 2).sum())(toy.params)
    for (instance, path, name, _), g in tree.flatten(got).items():
        dense = tree.flatten(plain)[(*path.split("/"), name)]
        index = fixed[instance][path][name][FIXED]["index"]
        np.testing.assert_allclose(g, dense.reshape(-1)[index], rtol=1e-4, atol=1e-5)


def test_take_keeps_order():
    leaves = take({("x", "w"): jnp.arange(6.0).reshape(2, 3)}, {("x", "w"): np.array([1, 4], np.int32)})
    np.testing.assert_array_equal(leaves["x"]["w"]["values"], [1.0, 4.0])


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="less than the head's 51"):
        jpeft.init(fish(0.001), key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match="count 50: less than the head's 51, which always trains"):
        jpeft.init(fish(count=50), key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match=r"more than the .* that can train"):
        jpeft.init(fish(count=10**6), key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match="count must be at least 0"):
        random_mask(count=-1)
    with pytest.raises(jpeft.UserError, match="ratio must be above 0 and at most 1, got 2"):
        fish(2)
    with pytest.raises(jpeft.UserError, match=r"labels 'expect' is unknown.*expected"):
        fish(labels="expect")
    with pytest.raises(jpeft.UserError, match="pass `params`"):
        jpeft.init(random_mask(), key, toy.sites)
