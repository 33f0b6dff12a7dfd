"""Training parameters that the model already has."""

import jax
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.transforms.bitfit import bitfit
from jpeft.transforms.layer_norm import layer_norm
from jpeft.transforms.top_k_layers import top_k_layers

MAKERS = {"bitfit": bitfit(), "layer_norm": layer_norm(), "top_k_layers": top_k_layers(1)}


@pytest.mark.parametrize("name", MAKERS)
def test_a_fresh_one_is_the_model_itself_bit_by_bit(toy, key, name):
    leaves = jpeft.init(MAKERS[name], key, toy.sites, toy.params)
    np.testing.assert_array_equal(toy.logits(MAKERS[name], leaves), toy.logits(jpeft.chain(), {}))


@pytest.mark.parametrize("name", MAKERS)
def test_trained_leaves_stand_where_the_originals_stood(toy, key, name):
    method = MAKERS[name]
    leaves = randomised(jpeft.init(method, key, toy.sites, toy.params))
    flat = tree.flatten(toy.params)
    for (_, path, leaf), x in tree.flatten(leaves).items():
        place = (*path.split("/"), leaf)
        assert flat[place].shape == x.shape
        flat[place] = x
    by_hand = toy.model.apply({"params": tree.unflatten(flat)}, toy.ids, toy.mask)[0]
    np.testing.assert_array_equal(toy.logits(method, leaves), by_hand)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.leaves == {}
    np.testing.assert_array_equal(toy.logits(jpeft.chain(), {}, params=merged.params), by_hand)


def test_bitfit_trains_all_biases_but_the_heads(toy, key):
    leaves = jpeft.init(bitfit(), key, toy.sites, toy.params)["bitfit_0"]
    chosen = {f"{path}/{leaf}" for path, own in leaves.items() for leaf in own}
    biases = {"/".join(path) for path in tree.flatten(toy.params) if path[-1] == "bias"}
    assert chosen == biases - {"classifier/bias"}
    only = jpeft.init(bitfit(layers=[1]), key, toy.sites, toy.params)["bitfit_0"]
    assert only
    assert all(path.startswith("encoder/layer_1/") for path in only)


def test_layer_norm_trains_scales_and_biases(toy, key):
    leaves = jpeft.init(layer_norm(), key, toy.sites, toy.params)["layer_norm_0"]
    assert len(leaves) == 5  # two a layer, one of the embeddings
    assert all(set(own) == {"scale", "bias"} for own in leaves.values())


def test_top_k_layers_trains_the_last_ones_and_the_pooler(toy, key):
    leaves = jpeft.init(top_k_layers(1), key, toy.sites, toy.params)["top_k_layers_0"]
    assert tree.count(leaves) == tree.count(toy.params["encoder"]["layer_1"]) + tree.count(toy.params["pooler"])


def test_only_the_chosen_get_gradients(toy, key):
    """What is not chosen has no leaf; what is has a gradient equal to that of the plain model there."""
    method = bitfit()
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    by_leaf = jax.grad(lambda x: (toy.logits(method, x) ** 2).sum())(leaves)
    plain = jax.grad(lambda p: (toy.model.apply({"params": p}, toy.ids, toy.mask)[0] ** 2).sum())(toy.params)
    flat = tree.flatten(plain)
    for (_, path, leaf), g in tree.flatten(by_leaf).items():
        np.testing.assert_allclose(g, flat[(*path.split("/"), leaf)], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="at most 2, the layers of the model, got 3"):
        jpeft.init(top_k_layers(3), key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match="num_layers must be positive"):
        top_k_layers(0)
    with pytest.raises(jpeft.UserError, match="pass `params`"):
        jpeft.init(bitfit(), key, toy.sites)
    with pytest.raises(jpeft.UserError, match=r"core.* is not one of the sites with their own parameters"):
        jpeft.init(bitfit(targets="attention/core"), key, toy.sites, toy.params)
