"""Steps that begin where training begins are those of the whole model, but for dropout below."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heard import again, run

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves
from jpeft.core.partition import partition
from jpeft.data import batching
from jpeft.data.batching import Examples
from jpeft.models import Bert, BertConfig
from jpeft.run import train as running
from jpeft.run.experiment import PREDICTIONS
from jpeft.training import below
from jpeft.training.step import forward
from jpeft.transforms.registry import METHODS

LAYERS = 3
MASKS = ("fish", "far", "random_mask", "magnitude_mask")  # which act wherever an entry was chosen
LOWEST = {  # all others act in layer 0, or below it
    "full": 0, "head": LAYERS, "top_k_layers": 1,
    "lora": 2, "houlsby": 2, "pfeiffer": 2, "prefix": 2,  # of one layer alone
}  # fmt: skip


def bert(by_token=False, kind="bert", **fields):
    config = BertConfig(
        model_type=kind, vocab_size=20, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24, by_token=by_token, **fields,
    )  # fmt: skip
    model = Bert(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]


def method_of(name):
    options = {"layers": (2,)} if LOWEST.get(name) == 2 else {"num_layers": 2} if name == "top_k_layers" else {}
    make = METHODS[name].make
    return jpeft.chain() if make is None else make(**options)


def parts_of(name, model, params):
    method = method_of(name)
    sites = jpeft.sites(model, jnp.ones((1, 8), jnp.int32))
    leaves = jpeft.init(method, jax.random.key(1), sites, params)
    trains = params if METHODS[name].trains_base else [x for x in ("pooler", "classifier") if x in params]
    return method, partition(method, params, leaves, trains)


def rows(n=9):
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(2, 20, length, dtype=np.int32) for length in rng.integers(2, 9, n))
    return Examples(ids, tuple(map(np.zeros_like, ids)), rng.integers(0, 2, n, dtype=np.int32))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("fishpal", *MASKS)])
def test_the_lowest_layer_of_each_method(name):
    _, parts = parts_of(name, *bert())
    assert below.lowest(parts, LAYERS) == LOWEST.get(name, 0)


@pytest.mark.parametrize(
    ("name", "by_token", "kind", "quantise"),
    [
        ("head", False, "bert", None),
        ("head", False, "roberta", None),
        ("head", True, "bert", None),
        ("lora", False, "bert", "nf4"),
        ("prefix", False, "bert", None),
        ("top_k_layers", True, "roberta", None),
    ],
)
def test_logits_and_gradients_are_those_of_the_whole_model(name, by_token, kind, quantise):
    model, params = bert(by_token, kind)
    if quantise:
        params = jpeft.quantise(params, jpeft.sites(model, jnp.ones((1, 8), jnp.int32)), quantise)
    method, parts = parts_of(name, model, params)
    layer, examples = below.lowest(parts, LAYERS), rows()
    assert layer > 0
    cached = below.with_hidden(model, params, examples, layer, (4, 8))
    order = [4, 0, 7]
    plain, short = (batching.together(batching.take(each, order), (8,)) for each in (examples, cached))
    alone = layer == LAYERS and not by_token
    assert short.hidden is not None
    assert short.hidden.states.shape == (3, 1 if alone else 8, 16)

    def loss(trainable, batch):
        logits = forward(model, method, trainable, parts.frozen, batch)
        real = batch.attention_mask[..., None] if by_token else 1  # what padding answers is read by nobody
        return jnp.sum(jnp.sin(logits) * real), logits * real

    found, expected = (
        jax.jit(jax.value_and_grad(loss, has_aux=True))(parts.trainable, batch) for batch in (short, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
    assert any(np.any(x) for x in jax.tree.leaves(expected[1]))


def test_too_many_rows_are_refused(monkeypatch):
    model, _ = bert()
    tokens = sum(map(len, rows().input_ids))
    assert below.planned_bytes(model.config, rows(), 1) == tokens * 16 * 4
    assert below.planned_bytes(model.config, rows(), LAYERS) == 9 * 16 * 4
    monkeypatch.setattr(below.os, "sysconf", lambda name: 40)
    with pytest.raises(UserError, match=r"cache_frozen_layers needs 0\.0 GB for 9 rows"):
        below.planned_bytes(model.config, rows(), 1)


@pytest.fixture
def without_dropout(tiny_model, tmp_path):
    """The tiny model, with dropout before the head alone."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.2}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("method", "more"), [("head", {}), ("lora", {"together": 2})])
def test_a_run_that_begins_higher_ends_as_one_that_does_not(
    method, more, tiny_config, without_dropout, tmp_path, monkeypatch
):
    begun, real = [], running.fit_together

    def fit(steps, states, frozen, data, *rest):
        begun.append(data.train.hidden is not None)
        return real(steps, states, frozen, data, *rest)

    monkeypatch.setattr(running, "fit_together", fit)

    def logits(folder, **fields):
        config = tiny_config(method, num_epochs=2, padded_lengths=2, **more, **fields)
        config.model, config.seeds = str(without_dropout), (1, 2)
        if method == "lora":
            config.peft.lora.layers = (1,)
        run(config, tmp_path / folder)
        return [read_leaves(tmp_path / folder / f"seed_{i}" / PREDICTIONS)["logits"] for i in (1, 2)]

    np.testing.assert_allclose(logits("short", cache_frozen_layers=True), logits("whole"), rtol=0, atol=1e-5)
    assert begun == sorted(begun, reverse=True)
    assert set(begun) == {True, False}


def test_where_nothing_can_be_cached_the_run_says_so(tiny_config, tmp_path):
    _, console = again(tiny_config("lora", num_epochs=1, padded_lengths=1, cache_frozen_layers=True), tmp_path)
    assert "config.train.cache_frozen_layers: the lowest layer trains, so there is nothing to cache" in console.warnings
