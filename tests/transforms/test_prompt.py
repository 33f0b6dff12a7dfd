"""Prompt tuning. That it equals both peers is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.models import Bert, BertConfig
from jpeft.transforms.prompt import prompt

METHODS = {"words": prompt(3), "states": prompt(3, placement="states")}


def leaves_of(method, toy, key):
    return randomised(jpeft.init(method, key, toy.sites, toy.params), scale=1.0)


def test_a_prompt_of_word_vectors_is_a_longer_text(toy, key):
    """Three ids in front of the text give the same logits as a prompt that holds their word vectors."""
    ids = jnp.array([7, 3, 20])
    method = prompt(3, token_ids=(7, 3, 20))
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    longer = jnp.concatenate([jnp.broadcast_to(ids[None], (4, 3)), toy.ids], 1)
    mask = jnp.concatenate([jnp.ones((4, 3), jnp.int32), toy.mask], 1)
    expected = toy.model.apply({"params": toy.params}, longer, mask)[0]
    np.testing.assert_allclose(toy.logits(method, leaves), expected, atol=2e-6)


def test_on_roberta_positions_count_through(key):
    config = BertConfig(
        "roberta", vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20, type_vocab_size=1, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model, ids = Bert(config), jax.random.randint(key, (3, 5), 2, 30)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    params = randomised(jax.eval_shape(model.init, key, ids)["params"])
    method = prompt(2, token_ids=(4, 9))
    leaves = jpeft.init(method, key, jpeft.sites(model, ids), params)
    longer = jnp.concatenate([jnp.broadcast_to(jnp.array([[4, 9]]), (3, 2)), ids], 1)
    long_mask = jnp.concatenate([jnp.ones((3, 2), int), mask], 1)
    expected = model.apply({"params": params}, longer, long_mask)[0]
    got = jpeft.apply(model, method, {"params": params, "peft": leaves}, ids, mask)[0]
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_padding_does_not_matter(toy, key, kind):
    leaves = leaves_of(METHODS[kind], toy, key)
    together = toy.logits(METHODS[kind], leaves)
    for i, n in enumerate(toy.mask.sum(1)):
        alone = toy.logits(METHODS[kind], leaves, ids=toy.ids[i : i + 1, :n], mask=toy.mask[i : i + 1, :n])
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


def test_states_stand_behind_the_embeddings(toy, key):
    """The encoder alone, given the embedded text with the prompt in front."""
    leaves = leaves_of(METHODS["states"], toy, key)
    _, seen = toy.model.apply({"params": toy.params}, toy.ids, toy.mask)
    rows = jnp.broadcast_to(leaves["prompt_0"]["encoder"]["embedding"][None], (4, 3, 16))
    from jpeft.models.bert import Encoder

    states = jnp.concatenate([rows, seen.hidden_states[0]], 1)
    mask = jnp.concatenate([jnp.ones((4, 3), jnp.int32), toy.mask], 1)
    last, _ = Encoder(toy.model.config).apply({"params": toy.params["encoder"]}, states, mask, train=False)
    dense = lambda x, p: x @ p["kernel"] + p["bias"][None]
    expected = dense(jnp.tanh(dense(last[:, 0], toy.params["pooler"])), toy.params["classifier"])
    np.testing.assert_allclose(toy.logits(METHODS["states"], leaves), expected, atol=2e-6)


def test_it_starts_from_rows_of_the_vocabulary_or_from_noise(toy, key):
    table = np.asarray(toy.params["embeddings"]["word_embeddings"]["embedding"])
    drawn = jpeft.init(prompt(5), key, toy.sites, toy.params)["prompt_0"]["embeddings/inputs"]["embedding"]
    assert all(any((row == other).all() for other in table) for row in np.asarray(drawn))
    noise = jpeft.init(prompt(400, "random"), key, toy.sites)["prompt_0"]["embeddings/inputs"]["embedding"]
    assert abs(float(noise.std()) - 1) < 0.05


def test_too_long_a_row_is_refused(toy, key):
    method = prompt(26)
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match="33 tokens; this model takes 32 at most"):
        toy.logits(method, leaves)


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="placement 'word' is unknown"):
        prompt(placement="word")
    with pytest.raises(jpeft.UserError, match="token_ids must be 2 ids"):
        prompt(2, token_ids=(1,))
    with pytest.raises(jpeft.UserError, match="token id 50 is not in the vocabulary of 50"):
        jpeft.init(prompt(1, token_ids=(50,)), key, toy.sites, toy.params)
    with pytest.raises(jpeft.UserError, match="pass `params`"):
        jpeft.init(prompt(1), key, toy.sites)
