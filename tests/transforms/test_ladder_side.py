"""Ladder-side tuning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised, setting

import jpeft
from jpeft.models.bert import Bert, BertConfig, Layer, attends
from jpeft.transforms.ladder_side import ladder_side

METHOD = ladder_side(4)


def fresh(toy, key, method=METHOD):
    return jpeft.init(method, key, toy.sites, toy.params)


def as_layer(p):
    """A block of the side network under the names of our encoder's layers."""
    flat = lambda d: {"kernel": d["kernel"].reshape(d["kernel"].shape[0], -1), "bias": d["bias"].reshape(-1)}
    output = {"kernel": p["output"]["kernel"].reshape(-1, p["output"]["kernel"].shape[-1]), "bias": p["output"]["bias"]}
    return {
        "attention": {**{name: flat(p[name]) for name in ("query", "key", "value")}, "output": output},
        "attention_add_norm": {"LayerNorm": p["attention_norm"]},
        "ffn": {"intermediate": p["intermediate"], "output": p["ffn_output"]},
        "ffn_add_norm": {"LayerNorm": p["ffn_norm"]},
    }


@pytest.mark.parametrize("own", [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-2}], ids=["bert", "others"])
def test_equals_a_ladder_built_of_the_encoders_own_layers(toy, key, own):
    toy = toy._replace(model=Bert(dataclasses.replace(toy.model.config, **own)))
    leaves = randomised(fresh(toy, key))
    p = leaves["ladder_side_0"]["encoder"]
    _, seen = toy.model.apply({"params": toy.params}, toy.ids, toy.mask)
    states = [np.asarray(h) for h in seen.hidden_states]
    small = Layer(BertConfig(hidden_size=4, num_attention_heads=2, intermediate_size=6, **own))
    down = [h @ np.asarray(p["down"]["kernel"][i]) + np.asarray(p["down"]["bias"][i]) for i, h in enumerate(states)]
    side = down[0]
    for i in range(2):
        gate = 1 / (1 + np.exp(-float(p["alpha"][i]) / 0.1))
        block = as_layer(jax.tree.map(lambda x, i=i: x[i], p["blocks"]))
        side = small.apply({"params": block}, gate * side + (1 - gate) * down[i + 1], attends(toy.mask), False)
    last = np.asarray(side) @ np.asarray(p["up"]["kernel"]) + np.asarray(p["up"]["bias"])
    dense = lambda x, d: x @ np.asarray(d["kernel"]) + np.asarray(d["bias"])
    expected = dense(np.tanh(dense(last[:, 0], toy.params["pooler"])), toy.params["classifier"])
    np.testing.assert_allclose(toy.logits(METHOD, leaves), expected, atol=2e-5)


def test_no_gradient_passes_through_the_backbone(toy, key):
    leaves = randomised(fresh(toy, key))
    grads = jax.grad(lambda p: (toy.logits(METHOD, leaves, params=p) ** 2).sum())(toy.params)
    for part in ("embeddings", "encoder"):
        assert all((g == 0).all() for g in jax.tree.leaves(grads[part]))
    assert any((g != 0).any() for g in jax.tree.leaves(grads["classifier"]))


def test_its_gradient_costs_far_less_than_an_adapters(toy, key):
    """XLA counts the operations: forward pass alone is a third of a full gradient, and a ladder's is little more."""

    def flops(method):
        leaves = fresh(toy, key, method)
        gradient = jax.jit(jax.grad(lambda x: (toy.logits(method, x) ** 2).sum()))
        return gradient.lower(leaves).compile().cost_analysis()["flops"]

    forward = jax.jit(lambda p: toy.model.apply({"params": p}, toy.ids, toy.mask)[0]).lower(toy.params).compile()
    forward = forward.cost_analysis()["flops"]
    adapter, ladder = flops(jpeft.pfeiffer(1)), flops(ladder_side(8))
    assert adapter > 1.5 * forward
    assert ladder < 1.0 * adapter
    assert ladder - forward < 0.7 * (adapter - forward)


def test_it_starts_as_a_cut_of_the_backbone(toy, key):
    """With one dimension in four kept, every kept weight is the backbone's, at the same dimensions in all layers."""
    blocks = fresh(toy, key)["ladder_side_0"]["encoder"]["blocks"]
    layers = [toy.params["encoder"][f"layer_{i}"] for i in range(2)]
    total = np.zeros(16)
    for layer in layers:
        a, f = layer["attention"], layer["ffn"]
        for w in (a["query"], a["key"], a["value"], f["intermediate"]):
            total += np.abs(w["kernel"]).sum(1)
        for w in (a["output"], f["output"]):
            total += np.abs(w["kernel"]).sum(0)
    stream = np.sort(np.argsort(-total)[:4])
    for i, layer in enumerate(layers):
        norm = layer["ffn_add_norm"]["LayerNorm"]["scale"]
        np.testing.assert_array_equal(blocks["ffn_norm"]["scale"][i], norm[stream])
        first, second = (np.asarray(layer["ffn"][name]["kernel"]) for name in ("intermediate", "output"))
        nodes = np.sort(np.argsort(-(np.abs(first).sum(0) + np.abs(second).sum(1)))[:6])
        np.testing.assert_array_equal(blocks["intermediate"]["kernel"][i], first[np.ix_(stream, nodes)])
        np.testing.assert_array_equal(blocks["ffn_output"]["kernel"][i], second[np.ix_(nodes, stream)])
        q, k = (np.asarray(layer["attention"][name]["kernel"]).reshape(16, 2, 8) for name in ("query", "key"))
        for head in range(2):
            best = np.sort(np.argsort(-(np.abs(q).sum(0) + np.abs(k).sum(0))[head])[:2])
            np.testing.assert_array_equal(blocks["query"]["kernel"][i][:, head], q[stream][:, head, best])
            np.testing.assert_array_equal(blocks["key"]["kernel"][i][:, head], k[stream][:, head, best])
        v = np.asarray(layer["attention"]["value"]["kernel"]).reshape(16, 2, 8)
        o = np.asarray(layer["attention"]["output"]["kernel"]).reshape(2, 8, 16)
        best = np.sort(np.argsort(-(np.abs(v).sum(0) + np.abs(o).sum(2))[1])[:2])
        np.testing.assert_array_equal(blocks["value"]["kernel"][i][:, 1], v[stream][:, 1, best])
        np.testing.assert_array_equal(blocks["output"]["kernel"][i][1], o[1][best][:, stream])


@pytest.mark.slow
def test_fisher_information_decides_another_cut(toy, key):
    method = ladder_side(4, init_from="fisher", num_examples=4)
    leaves = jpeft.prepare(method, setting(toy, method, key))
    chosen = leaves["ladder_side_0"]["encoder"]["blocks"]["ffn_norm"]["scale"]
    total = np.zeros(16)

    def loss(params, i):
        logits = toy.model.apply({"params": params}, toy.ids[i : i + 1], toy.mask[i : i + 1])[0][0]
        return -jax.nn.log_softmax(logits)[toy.labels[i]]

    for i in range(4):
        grads = jax.grad(loss)(toy.params, i)["encoder"]
        for layer in grads.values():
            a, f = layer["attention"], layer["ffn"]
            for w in (a["query"], a["key"], a["value"], f["intermediate"]):
                total += np.square(w["kernel"]).sum(1)
            for w in (a["output"], f["output"]):
                total += np.square(w["kernel"]).sum(0)
    stream = np.sort(np.argsort(-total)[:4])
    norms = [toy.params["encoder"][f"layer_{i}"]["ffn_add_norm"]["LayerNorm"]["scale"] for i in range(2)]
    np.testing.assert_array_equal(chosen, np.stack([norm[stream] for norm in norms]))


def test_a_random_start_needs_no_parameters(toy, key):
    leaves = jpeft.init(ladder_side(4, init_from="random"), key, toy.sites)
    chex_shapes = jax.tree.map(jnp.shape, leaves)
    assert chex_shapes == jax.tree.map(jnp.shape, fresh(toy, key))


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="does not divide the head width 8"):
        fresh(toy, key, ladder_side(3))
    with pytest.raises(jpeft.UserError, match="init_from 'fischer' is unknown"):
        ladder_side(init_from="fischer")
    with pytest.raises(jpeft.UserError, match="pass `params`"):
        jpeft.init(METHOD, key, toy.sites)
    with pytest.raises(jpeft.UserError, match="is not one of the sites with arguments"):
        fresh(toy, key, ladder_side(targets="pooler"))
