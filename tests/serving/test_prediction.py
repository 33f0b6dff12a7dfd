import dataclasses

import jax
import numpy as np
import pytest
from conftest import WORDS, randomised

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.tree import replace
from jpeft.data import tokenizer as tokenizers
from jpeft.models import Bert, pretrained
from jpeft.plans import plan as plans
from jpeft.serving import prediction

PLAN = {0: [plans.Entry("prefix", {"mlp_hidden": 8})], 1: [plans.Entry("pfeiffer", {"bottleneck": 4})]}
PAIRS = [("the dog runs", "the cat sleeps"), ("a tree", "a house"), ("the dog runs", "the cat sees a big tree")]


@pytest.fixture(scope="module")
def saved(tiny_model):
    """A model of pairs in memory, as `jpeft.load` returns it."""
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(7))
    model, transform = Bert(loaded.config), plans.build(plans.spec(PLAN))
    sites = jpeft.sites(model, jax.ShapeDtypeStruct((1, 5), "int32"))
    leaves = randomised(jpeft.init(transform, jax.random.key(1), sites, loaded.params))
    variables = {"params": randomised(loaded.params), "peft": leaves}
    tokenizer = tokenizers.load(tiny_model, loaded.config.vocab_size)
    return jpeft.Saved(model, transform, variables, ("no", "yes"), "mrpc", 16, tokenizer, 2, tiny_model, {})


def test_logits_are_those_by_hand(saved):
    logits = jpeft.predict(saved, PAIRS)
    assert (logits.shape, logits.dtype) == ((3, 2), np.float32)
    assert np.abs(logits[0] - logits[2]).max() > 1e-3
    # [CLS] the dog runs [SEP] the cat sleeps [SEP]
    ids = np.array([[2, 4, 6, 10, 3, 4, 7, 11, 3]], np.int32)
    types = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1]], np.int32)
    mask = np.ones_like(ids)
    by_hand = jpeft.apply(saved.model, saved.transform, saved.variables, ids, mask, types, mask=mask)[0]
    np.testing.assert_allclose(logits[:1], by_hand, atol=1e-5)


def test_many_rows_come_back_in_their_order(saved, monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [tuple(" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(2)) for _ in range(11)]
    together = jpeft.predict(saved, pairs)
    monkeypatch.setattr(prediction, "BATCH_SIZE", 4)
    np.testing.assert_allclose(jpeft.predict(saved, pairs), together, atol=1e-5)
    np.testing.assert_allclose(jpeft.predict(saved, pairs[::-1]), together[::-1], atol=1e-5)


def test_a_shape_is_compiled_once(saved):
    prediction._forward.clear_cache()
    for pairs in (PAIRS[:1], PAIRS[1:2], PAIRS[:1]):  # 9 and 7 tokens: two padded lengths
        jpeft.predict(saved, pairs)
    assert prediction._forward._cache_size() == 2


def test_sentences_are_cut_as_in_training(saved):
    one = saved._replace(num_texts=1)
    assert jpeft.predict(one, ["the dog", "the dog " * 40]).shape == (2, 2)
    np.testing.assert_allclose(jpeft.predict(one, ["the dog " * 40]), jpeft.predict(one, ["the dog " * 7]), atol=1e-5)


def test_few_shapes_whatever_the_texts_are(monkeypatch):
    assert [prediction.shapes(n, 30)[0] for n in (1, 2, 3, 4, 5, 31, 32, 33, 1000)] == [1, 2, 4, 4, 8, 32, 32, 32, 32]
    assert prediction.shapes(1, 30)[1] == (8, 12, 16, 20, 24, 28, 30)
    monkeypatch.setattr(prediction.jax, "default_backend", lambda: "gpu")
    assert prediction.shapes(1, 30)[1] == (8, 16, 24, 30)


def test_rows_are_not_padded_beyond_what_the_model_takes(saved):
    """30 positions are not a multiple of 8, as padded lengths are."""
    config = dataclasses.replace(saved.model.config, max_position_embeddings=30)
    params = replace(saved.variables["params"], "embeddings/position_embeddings/embedding", lambda x: x[:30])
    short = saved._replace(
        model=Bert(config), variables={**saved.variables, "params": params}, max_length=30, num_texts=1
    )
    long = "the dog " * 40
    expected = jpeft.predict(saved._replace(max_length=30, num_texts=1), [long])
    np.testing.assert_allclose(jpeft.predict(short, [long]), expected, atol=1e-5)


def test_no_texts(saved):
    assert jpeft.predict(saved, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("the dog", r"one string: predict\(saved, \['the dog'\]\)"),
        (["the dog"], "text 0: expected a pair of sentences, as in training, got 'the dog'"),
        ([("the dog", "a cat"), "the dog"], "text 1: expected a pair"),
        ([("the dog", "a cat", "a tree")], "text 0: expected a pair"),
        ([("the dog", None)], "text 0: expected a pair"),
        ([7], "text 0: expected a pair of sentences, .* got 7"),
    ],
)
def test_what_it_was_not_trained_on(saved, texts, message):
    with pytest.raises(UserError, match=message):
        jpeft.predict(saved, texts)


@pytest.mark.parametrize("texts", [["\ud800"], None, 5, iter(["a"]), np.array("a")])
def test_what_is_no_list_of_texts_is_refused(saved, texts):
    with pytest.raises(UserError, match="expected"):
        jpeft.predict(saved, texts)


@pytest.mark.parametrize("wrong", [None, "path"])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(UserError, match=r"expected what jpeft\.load returns"):
        jpeft.predict(wrong, ["a"])


def test_texts_that_only_the_task_can_encode(saved):
    with pytest.raises(UserError, match="the task of this model has its own `encode`, which is not saved with it"):
        jpeft.predict(saved._replace(own_encode=True), PAIRS)
