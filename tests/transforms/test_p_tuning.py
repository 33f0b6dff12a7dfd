"""P-tuning. That both encoders equal peft's is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.models import Bert, BertConfig
from jpeft.transforms.p_tuning import p_tuning
from jpeft.transforms.prompt import prompt

PATH = "embeddings/inputs"
METHODS = {"lstm": p_tuning(3, "lstm", 4), "mlp": p_tuning(3, "mlp", 4)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(p):
    """The prompt vectors, one token and one gate at a time."""
    x = np.asarray(p["embedding"], np.float64)
    as_numpy = lambda d: (np.asarray(d["kernel"], np.float64), np.asarray(d["bias"], np.float64))
    for i in range(len(p.get("lstm", {}))):
        out = np.zeros((len(x), 8))
        for name, steps, at in (("forward", range(len(x)), 0), ("backward", reversed(range(len(x))), 4)):
            (w, b), (u, c) = (as_numpy(p["lstm"][str(i)][name][part]) for part in ("input", "recurrent"))
            h, cell = np.zeros(4), np.zeros(4)
            for t in steps:
                gates = x[t] @ w + b + h @ u + c
                take, forget, new, show = (gates[4 * j : 4 * j + 4] for j in range(4))
                cell = sigmoid(forget) * cell + sigmoid(take) * np.tanh(new)
                h = sigmoid(show) * np.tanh(cell)
                out[t, at : at + 4] = h
        x = out
    for i in range(len(p["mlp"])):
        w, b = as_numpy(p["mlp"][str(i)])
        x = (np.maximum(x, 0) if i else x) @ w + b
    return x


@pytest.mark.parametrize("kind", METHODS)
def test_it_is_a_prompt_of_what_the_encoder_makes(toy, key, kind):
    leaves = randomised(jpeft.init(METHODS[kind], key, toy.sites), scale=0.7)
    vectors = {"prompt_0": {PATH: {"embedding": jnp.asarray(by_hand(leaves["p_tuning_0"][PATH]), jnp.float32)}}}
    now = toy.logits(METHODS[kind], leaves)
    np.testing.assert_allclose(now, toy.logits(prompt(3), vectors), atol=1e-5)
    folded = jpeft.fold(METHODS[kind], leaves)
    assert jax.tree.map(jnp.shape, folded) == {"p_tuning_0": {PATH: {"vectors": (3, 16)}}}
    np.testing.assert_allclose(toy.logits(METHODS[kind], folded), now, atol=1e-6)
    np.testing.assert_array_equal(jpeft.fold(METHODS[kind], folded)["p_tuning_0"][PATH]["vectors"],
                                  folded["p_tuning_0"][PATH]["vectors"])  # fmt: skip


def test_a_template_mixes_prompts_and_anchors(toy, key):
    method = p_tuning(2, "mlp", 4, template=("prompt", 7, "prompt", 20))
    leaves = jpeft.init(method, key, toy.sites, toy.params)
    own = leaves["p_tuning_0"][PATH]
    made, table = by_hand(own), toy.params["embeddings"]["word_embeddings"]["embedding"]
    rows = jnp.stack([jnp.asarray(made[0]), table[7], jnp.asarray(made[1]), table[20]])
    expected = toy.logits(prompt(4), {"prompt_0": {PATH: {"embedding": rows}}})
    np.testing.assert_allclose(toy.logits(method, leaves), expected, atol=1e-5)
    trained, fixed = jpeft.core.partition.split(leaves)
    assert set(fixed["p_tuning_0"][PATH]["fixed"]) == {"anchors"}
    assert "fixed" not in trained["p_tuning_0"][PATH]
    np.testing.assert_allclose(toy.logits(method, jpeft.fold(method, leaves)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (("input", "prompt", 7, "prompt"), lambda text: [*text, 3, 7, 20]),
        (("prompt", "input", 7, "prompt"), lambda text: [3, *text, 7, 20]),
        ((7, "prompt", "input", "prompt"), lambda text: [7, 3, *text, 20]),
        (("prompt", 7, "prompt", "input"), lambda text: [3, 7, 20, *text]),
    ],
)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_tokens_stand_where_the_template_says(toy, key, template, wanted, architecture):
    """With word vectors for virtual tokens it is a text with more words, of one row without padding at a time."""
    model = Bert(BertConfig(**{**vars(toy.model.config), "model_type": architecture, "pad_token_id": 0}))
    params = randomised(jax.eval_shape(model.init, key, toy.ids)["params"], seed=3)
    table = params["embeddings"]["word_embeddings"]["embedding"]
    own = {"vectors": table[jnp.array([3, 20])], "fixed": {"anchors": table[jnp.array([7])]}}
    method, variables = (
        p_tuning(2, "mlp", 4, template=template),
        {"params": params, "peft": {"p_tuning_0": {PATH: own}}},
    )
    together = jpeft.apply(model, method, variables, toy.ids, toy.mask)[0]
    for i, n in enumerate(toy.mask.sum(1)):
        longer = jnp.array([wanted(toy.ids[i, :n].tolist())])
        np.testing.assert_allclose(together[i], model.apply({"params": params}, longer)[0][0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("template", [("input", "prompt", "prompt"), ("prompt", "input", "prompt")])
def test_gates_count_tokens_behind_the_text(toy, key, template):
    method = jpeft.chain(
        p_tuning(2, "mlp", 4, template=template), jpeft.lora(2, gate=True), jpeft.prefix(2, 4, gate=True)
    )
    leaves = randomised(jpeft.init(method, key, toy.sites, toy.params), scale=0.7)
    together = toy.logits(method, leaves)
    for i, n in enumerate(toy.mask.sum(1)):
        alone = toy.logits(method, leaves, ids=toy.ids[i : i + 1, :n], mask=toy.mask[i : i + 1, :n])
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


def test_dropout_is_between_the_lstm_layers(toy, key):
    method = p_tuning(3, "lstm", 4, dropout=0.5)
    leaves = randomised(jpeft.init(method, key, toy.sites), scale=0.7)
    run = lambda seed: toy.logits(method, leaves, rngs={"dropout": jax.random.key(seed)})
    assert jnp.abs(run(1) - run(2)).max() > 1e-3
    np.testing.assert_array_equal(run(1), run(1))


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="encoder 'gru' is unknown"):
        p_tuning(encoder="gru")
    with pytest.raises(jpeft.UserError, match="template must have 'prompt' 2 times"):
        p_tuning(2, template=("prompt", 3))
    with pytest.raises(jpeft.UserError, match="'input' at most once"):
        p_tuning(1, template=("input", "prompt", "input"))
    with pytest.raises(jpeft.UserError, match="'input' at most once"):
        p_tuning(1, template=("prompt", "text"))
    with pytest.raises(jpeft.UserError, match="pass `params`"):
        jpeft.init(p_tuning(1, template=("prompt", 3)), key, toy.sites)
    with pytest.raises(jpeft.UserError, match="token id 99"):
        jpeft.init(p_tuning(1, template=("prompt", 99)), key, toy.sites, toy.params)
