"""AdapterDrop."""

import jax
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.core.transform import FIXED
from jpeft.models import Bert, BertConfig
from jpeft.transforms.adapterdrop import adapterdrop, drop_layers

LAYERS = 3
# Without dropout of its own, so that only the drawn number of layers differs from step to step.
MODEL = Bert(
    BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
)  # fmt: skip
IDS = jax.random.randint(jax.random.key(5), (3, 6), 1, 20)
SITES = jpeft.sites(MODEL, IDS)
PARAMS = randomised(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), IDS)["params"]), 1)


def logits(method, leaves, key=None):
    def forward(leaves, key):
        rngs = None if key is None else {"dropout": key}
        return jpeft.apply(MODEL, method, {"params": PARAMS, "peft": leaves}, IDS, train=key is not None, rngs=rngs)[0]

    return jax.jit(forward)(leaves, key)


def drawn(method, seed=2):
    trains, fixed = split(jpeft.init(method, jax.random.key(1), SITES))
    return tree.union(randomised(trains, seed), fixed)


def without_first(leaves, n):
    """The logits of plain Pfeiffer adapters in the layers from n up."""
    own = {path: x for path, x in leaves["adapterdrop_0"].items() if int(path.split("/")[1].split("_")[1]) >= n}
    own = {path: {"down": x["down"], "up": x["up"]} for path, x in own.items()}
    return logits(jpeft.pfeiffer(), {"pfeiffer_0": own})


def test_a_training_step_leaves_out_the_adapters_below_a_drawn_layer():
    method = adapterdrop(4)
    leaves = drawn(method)
    wanted = np.stack([without_first(leaves, n) for n in range(LAYERS)])
    assert min(np.abs(wanted[i] - wanted[j]).max() for i in range(LAYERS) for j in range(i)) > 1e-3
    step = jax.jit(lambda key: logits(method, leaves, key))
    seen = []
    for i in range(45):
        off = np.abs(np.asarray(step(jax.random.key(i)))[None] - wanted).max((1, 2))
        assert off.min() < 1e-5  # one n for the whole model, not one for each layer
        seen.append(int(off.argmin()))
    assert step._cache_size() == 1
    counts = np.bincount(seen, minlength=LAYERS)
    assert counts.min() >= 5  # all of 0 ... L - 1, about as often


@pytest.mark.parametrize("n", [0, 2])
def test_inference_without_the_first_layers(n):
    leaves = drawn(adapterdrop(4))
    method = adapterdrop(4, drop=n)
    now = logits(method, leaves)
    np.testing.assert_allclose(now, without_first(leaves, n), atol=1e-5)
    folded = jpeft.fold(method, leaves)
    assert len(folded["adapterdrop_0"]) == LAYERS - n
    assert all(FIXED not in own for own in folded["adapterdrop_0"].values())
    np.testing.assert_allclose(logits(method, folded), now, atol=1e-6)


def test_dropped_layers_are_not_in_the_graph():
    leaves = drawn(adapterdrop(4))

    def flops(n):
        return jax.jit(lambda p: logits(adapterdrop(4, drop=n), p)).lower(leaves).compile().cost_analysis()["flops"]

    assert flops(0) > flops(1) > flops(2)


def test_a_specialised_one_has_no_leaves_in_the_dropped_layers_and_draws_nothing():
    method = adapterdrop(4, drop=2, robust=False)
    leaves = drawn(method)
    assert list(leaves["adapterdrop_0"]) == [f"encoder/layer_{i}/ffn_add_norm" for i in (2,)]
    assert split(leaves)[1] == {}
    for i in range(2):
        np.testing.assert_allclose(logits(method, leaves, jax.random.key(i)), without_first(leaves, 2), atol=1e-5)


def test_layers_are_counted_in_the_model_not_among_the_adapters():
    method = adapterdrop(4, layers=[0, 2])
    leaves = drawn(method)
    assert {int(x) for x in jax.tree.leaves(split(leaves)[1])} == {LAYERS}
    own = {path: {"down": x["down"], "up": x["up"]} for path, x in leaves["adapterdrop_0"].items()}
    path = "encoder/layer_2/ffn_add_norm"
    both, upper = (logits(jpeft.pfeiffer(), {"pfeiffer_0": x}) for x in (own, {path: own[path]}))
    step, uppers = jax.jit(lambda key: logits(method, leaves, key)), 0
    for i in range(45):
        now = step(jax.random.key(i))
        off = [np.abs(now - x).max() for x in (both, upper)]
        assert min(off) < 1e-5
        uppers += off[1] < off[0]
    assert 20 <= uppers <= 40  # n of 1 or 2 out of 0 ... 2: 45 times 2/3, give or take 3 deviations


def test_drop_layers_of_any_method():
    leaves = jpeft.init(jpeft.prefix(2, 4), jax.random.key(0), SITES)["prefix_0"]
    assert set(drop_layers(leaves, 2)) == {"shared", "encoder/layer_2/attention/core"}
    assert drop_layers(leaves, 0) == leaves


def test_errors():
    for drop in (-1, 1.0, True):
        with pytest.raises(UserError, match="drop must be a non-negative integer"):
            adapterdrop(drop=drop)
    with pytest.raises(UserError, match="drop 3 leaves no adapter: the last one is in layer 2"):
        jpeft.init(adapterdrop(4, drop=3), jax.random.key(0), SITES)
    with pytest.raises(UserError, match=r"'pooler' .* is not one of the sites with arguments"):
        jpeft.init(adapterdrop(4, targets="pooler"), jax.random.key(0), SITES)
    with pytest.raises(UserError, match="activation 'rleu' is unknown"):
        adapterdrop(activation="rleu")
