"""Inference-time intervention, on a classifier that is trained here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomised

import jpeft
from jpeft.models import Bert, BertConfig
from jpeft.transforms.iti import Probes, activations, iti, probe

CONFIG = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
    max_position_embeddings=16, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
MODEL = Bert(CONFIG)


@pytest.fixture(scope="module")
def trained():
    """Parameters, ids, mask and labels: after the first token, rows of label 1 have more even ids than odd ones."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 40, (192, 8))
    ids[:, 0] = 1
    labels = ((ids[:, 1:] % 2 == 0).sum(1) > 3).astype(np.int32)
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.ones((192, 8), jnp.int32)
    params, optimizer = MODEL.init(jax.random.key(0), ids)["params"], optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(p):
            logits = MODEL.apply({"params": p}, ids, mask)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    return params, ids, mask, labels


@pytest.fixture(scope="module")
def probes(trained):
    params, ids, mask, labels = trained
    heads = activations(MODEL, params, ids, mask)
    return probe(heads[:128], labels[:128], heads[128:], labels[128:])


def test_activations_are_what_enters_the_output_projection(trained):
    params, ids, mask, _ = trained
    heads = activations(MODEL, params, ids[:5], mask[:5], batch_size=2)
    assert heads.shape == (5, 2, 4, 4)
    _, kept = MODEL.apply({"params": params}, ids[:5], mask[:5], capture_intermediates=True)
    for layer in range(2):
        attention = kept["intermediates"]["encoder"][f"layer_{layer}"]["attention"]
        projected = np.asarray(attention["output"]["__call__"][0][:, 0])
        weights = params["encoder"][f"layer_{layer}"]["attention"]["output"]
        mine = heads[:, layer].reshape(5, 16) @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
        np.testing.assert_allclose(mine, projected, atol=1e-5)


def test_activations_with_token_types_a_method_and_remat(trained):
    """Against what the method's own run gives to the output projection, of a model that computes layers again."""
    params, ids, mask, _ = trained
    model, types = Bert(BertConfig(**{**vars(CONFIG), "remat": True})), ids[:5] % 2
    method = jpeft.chain(jpeft.prompt(2), jpeft.prefix(2, None), jpeft.lora(2))
    leaves = randomised(jpeft.init(method, jax.random.key(1), jpeft.sites(MODEL, ids), params))
    heads = activations(model, params, ids[:5], mask[:5], types, 2, method, leaves)
    seen = []

    def wrap(own, site, call, args, ctx):
        seen.append(np.asarray(args[0][:, 0]))
        return call(*args)

    spy = jpeft.Transform("spy", lambda key, sites, params: {}, wrap)
    at_outputs = {"spy_0": {f"encoder/layer_{i}/attention/output": {} for i in range(2)}}
    variables = {"params": params, "peft": {**leaves, **at_outputs}}
    jpeft.apply(MODEL, jpeft.chain(method, spy), variables, ids[:5], mask[:5], types, mask=mask[:5])
    np.testing.assert_allclose(heads.reshape(5, 2, 16), np.stack(seen, 1), atol=1e-5)
    bare = activations(model, params, ids[:5], mask[:5], types)
    assert np.abs(bare - heads).max() > 0.01
    assert np.abs(bare - activations(model, params, ids[:5], mask[:5])).max() > 1e-3


def test_probes_measure_direction_and_deviation(trained, probes):
    params, ids, mask, labels = trained
    heads = activations(MODEL, params, ids, mask)
    assert probes.accuracy.max() > 0.8
    one, zero = (heads[:128][labels[:128] == c, 1, 2].mean(0) for c in (1, 0))
    direction = (one - zero) / np.linalg.norm(one - zero)
    np.testing.assert_allclose(probes.direction[1, 2], direction, rtol=1e-4)
    np.testing.assert_allclose(probes.deviation[1, 2], np.std(heads[:, 1, 2] @ direction), rtol=1e-4)


def test_the_shift_moves_answers_towards_its_class_and_merges(trained, probes):
    params, ids, mask, _ = trained
    before = MODEL.apply({"params": params}, ids, mask)[0]
    margin = {}
    for strength in (-3.0, 3.0):
        method = iti(probes, num_heads=3, strength=strength)
        leaves = jpeft.init(method, jax.random.key(0), jpeft.sites(MODEL, ids))
        assert jpeft.core.partition.split(leaves)[0] == {}
        after = jpeft.apply(MODEL, method, {"params": params, "peft": leaves}, ids, mask)[0]
        merged = jpeft.merge(method, leaves, params)
        np.testing.assert_allclose(MODEL.apply({"params": merged.params}, ids, mask)[0], after, atol=1e-5)
        margin[strength] = float((after[:, 1] - after[:, 0]).mean() - (before[:, 1] - before[:, 0]).mean())
    assert margin[-3.0] < -0.1
    assert margin[3.0] > 0.1


def test_only_the_best_heads_are_shifted(trained):
    _, ids, _, _ = trained
    accuracy = np.array([[0.5, 0.9, 0.6, 0.6], [0.5, 0.5, 0.5, 0.6]])
    found = Probes(accuracy, np.full((2, 4, 4), 0.5), np.full((2, 4), 2.0))
    leaves = jpeft.init(iti(found, 2, 10.0), jax.random.key(0), jpeft.sites(MODEL, ids))["iti_0"]
    assert list(leaves) == ["encoder/layer_0/attention/output"]
    shift = leaves["encoder/layer_0/attention/output"]["fixed"]["shift"].reshape(4, 4)
    np.testing.assert_allclose(shift, np.array([0, 10.0, 10.0, 0])[:, None] * np.ones((4, 4)))


def test_what_cannot_be_is_refused(trained, probes):
    _, ids, _, _ = trained
    with pytest.raises(jpeft.UserError, match="labels 0 and 1, got"):
        probe(np.zeros((3, 1, 1, 2)), np.array([0, 1, 2]), np.zeros((1, 1, 1, 2)), np.array([0]))
    with pytest.raises(jpeft.UserError, match="do not fit"):
        probe(np.zeros((2, 1, 1, 2)), np.array([0, 1]), np.zeros((1, 2, 1, 2)), np.array([0]))
    rows, labels = np.random.default_rng(0).normal(size=(4, 1, 1, 2)), np.array([0, 1, 0, 1])
    with pytest.raises(jpeft.UserError, match="expected held-out rows"):
        probe(rows, labels, rows[:0], labels[:0])
    with pytest.raises(jpeft.UserError, match="activations in train are not finite"):
        probe(rows * np.nan, labels, rows, labels)
    with pytest.raises(jpeft.UserError, match="activations in held_out are not finite"):
        probe(rows, labels, rows * np.inf, labels)
    other = Probes(*(x[:1] for x in probes))
    with pytest.raises(jpeft.UserError, match="1 layers of 16 channels were probed"):
        jpeft.init(iti(other), jax.random.key(0), jpeft.sites(MODEL, ids))
