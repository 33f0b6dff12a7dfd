"""What every method must do, whatever it is: run as a library under all of JAX, be saved, merge or fold, and learn."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Toy, all_but_slow, randomised, setting

import jpeft
from jpeft.core import tree
from jpeft.core.files import read_leaves, write_leaves
from jpeft.core.partition import split
from jpeft.core.transform import FIXED, members, stays
from jpeft.models import Bert, BertConfig
from jpeft.transforms.registry import METHODS, MODULES

CONFIG = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, initializer_range=0.15, num_labels=3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def rows(seed: int, n: int = 32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, mask and labels: after a first token that is always the same, every token tells the label of its row."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    ids = 3 * rng.integers(1, 20, (n, 9)) + labels[:, None]
    ids[:, 0] = 1
    mask = np.arange(9)[None] < rng.integers(4, 10, (n, 1))
    return tuple(jnp.asarray(x, jnp.int32) for x in (ids, mask, labels))


MODEL = Bert(CONFIG)
IDS, MASK, LABELS = rows(1)


@functools.cache
def pretrained() -> dict[str, Any]:
    """A model that has begun to attend to what matters, so that modules have something to work with."""
    ids, mask, labels = rows(10, 64)
    params = randomised(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), ids)["params"]), seed=5, scale=0.15)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = MODEL.apply({"params": params}, ids, mask)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, value = optimizer.init(params), 9.0
    while value > 0.9:
        params, state, value = step(params, state)
    return tree.replace(params, "classifier/kernel", lambda x: 4 * x)  # a head that hears what modules say


# Sizes for a model of two narrow layers; all else is each method's default.
SOME = "query|value|intermediate|ffn/output"  # few arrays compile sooner than all
SMALL = {
    "adapterdrop": {"bottleneck": 8},
    "far": {"num_examples": 8, "batch_size": 4},
    "ladder_side": {"reduction_factor": 4},
    "fish": {"ratio": 0.05, "num_examples": 4, "targets": SOME},
    "houlsby": {"bottleneck": 8},
    "pfeiffer": {"bottleneck": 8},
    "mam": {"mlp_hidden": 16, "bottleneck": 16},
    "prefix": {"mlp_hidden": 16},
    "p_tuning": {"num_virtual_tokens": 8, "hidden": 32},
    "magnitude_mask": {"ratio": 0.05, "targets": SOME},
    "random_mask": {"ratio": 0.05, "targets": SOME},
    "sparse_adapter": {"bottleneck": 16},
    "top_k_layers": {"num_layers": 1},
    "unipelt": {"mlp_hidden": 16, "reduction_factor": 4},
}
NAMES = MODULES
KEYS = list(jax.random.split(jax.random.key(6), 300))


class Made(NamedTuple):
    """A method with its randomised leaves that train, its fixed leaves as data would have prepared them, its logits.

    The loss and the logits, with the gradient of the loss, come from a program that tells how often it was traced.
    """

    method: jpeft.Transform | jpeft.Chain
    trained: dict[str, Any]
    fixed: dict[str, Any]
    logits: np.ndarray
    value: float
    grads: dict[str, Any]
    program: Callable[..., Any]
    traced: list[str]


@functools.cache
def make(name: str) -> Made:
    method = METHODS[name].make(**SMALL.get(name, {}))
    trained, fixed = prepared(name)
    trained, traced = moved(trained, scale=0.1), []

    def value(trained):
        traced.append(name)
        out = logits(method, trained, fixed)
        return optax.softmax_cross_entropy_with_integer_labels(out, LABELS).mean(), out

    program = jax.jit(jax.value_and_grad(value, has_aux=True))
    (found, now), grads = program(trained)
    return Made(method, trained, fixed, np.asarray(now), float(found), grads, program, traced)


def moved(leaves, by=None, scale=1.0):
    """Leaves moved by a number or by noise; in NumPy, since JAX would compile a program for every shape."""
    by = randomised(leaves, scale=scale) if by is None else jax.tree.map(lambda x: by, leaves)
    return jax.tree.map(lambda x, y: jax.device_put(np.asarray(np.asarray(x) + np.asarray(y), x.dtype)), leaves, by)


@functools.cache
def prepared(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    method = METHODS[name].make(**SMALL.get(name, {}))
    toy = Toy(MODEL, pretrained(), IDS, MASK, LABELS, jpeft.sites(MODEL, IDS, MASK))
    return split(jpeft.prepare(method, setting(toy, method, jax.random.key(4))))


def logits(method, trained, fixed, ids=IDS, mask=MASK, model=MODEL, params=None, **kwargs):
    variables = {"params": pretrained() if params is None else params, "peft": tree.union(fixed, trained)}
    return jpeft.apply(model, method, variables, ids, mask, mask=mask, **kwargs)[0]


def loss(method, trained, fixed, ids, mask, labels, **kwargs):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(method, trained, fixed, ids, mask, **kwargs), labels
    ).mean()


def close(got, wanted, tolerance=1e-4):
    """By leaf, in norm."""
    got, wanted = (jax.tree.map(np.asarray, x) for x in (got, wanted))
    largest = max(float(np.linalg.norm(x)) for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6 * largest


# One for each way to act: on weights, around a site, in attention, on rows, beside the encoder, on entries of the base.
REPRESENTATIVES = ("dora", "pfeiffer", "unipelt", "p_tuning", "ladder_side", "fish")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_under_jit_and_traces_once(name):
    _, trained, _, now, value, grads, program, traced = make(name)
    program(moved(trained, 0.01))
    assert len(traced) == 1
    expected = -np.mean((now - np.log(np.exp(now).sum(1, keepdims=True)))[np.arange(len(now)), LABELS])
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert any(np.any(g) for g in jax.tree.leaves(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, trained)


VARIED = (*REPRESENTATIVES, "lora", "adamix", "prompt", "said", "prefix")


@pytest.mark.parametrize("name", VARIED)
def test_it_runs_under_vmap_over_rows_and_over_leaves(name):
    method, trained, fixed, now, *_ = make(name)

    def one(trained, ids, mask):
        return logits(method, trained, fixed, ids[None], mask[None])[0]

    stacked = jax.tree.map(lambda x: np.stack([2 * np.asarray(x), x]), trained)
    by_row = jax.vmap(one, (None, 0, 0))  # and all of them for several sets of leaves
    two = np.asarray(jax.jit(jax.vmap(by_row, (0, None, None)))(stacked, IDS, MASK))
    np.testing.assert_allclose(two[1], now, atol=5e-5)
    assert np.abs(two[0] - now).max() > 1e-3


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_gradients_are_the_same_by_example_and_with_remat(name):
    method, trained, fixed, _, _, grads, _, _ = make(name)
    remat = Bert(BertConfig(**{**vars(CONFIG), "remat": True}))

    def one(trained, ids, mask, label):
        return loss(method, trained, fixed, ids[None], mask[None], label[None])

    @jax.jit
    def both(trained):
        by_example = jax.vmap(jax.grad(one), (None, 0, 0, 0))(trained, IDS, MASK, LABELS)
        return by_example, jax.grad(lambda t: loss(method, t, fixed, IDS, MASK, LABELS, model=remat))(trained)

    by_example, recomputed = jax.tree.map(np.asarray, both(trained))
    close(jax.tree.map(lambda g: g.mean(0), by_example), grads)
    close(recomputed, grads)


@pytest.mark.parametrize("name", [*VARIED, "pissa", "ia3", "krona", "bitfit"])
def test_it_computes_in_bfloat16_with_float32_leaves(name):
    method, trained, fixed, now, *_ = make(name)
    low = Bert(BertConfig(**{**vars(CONFIG), "dtype": "bfloat16"}))

    def value(trained):
        rough = logits(method, trained, fixed, model=low)
        return optax.softmax_cross_entropy_with_integer_labels(rough, LABELS).mean(), rough

    (_, rough), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(trained)
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(rough) - now).mean() < 0.05 * (1 + np.abs(now).mean())
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, trained)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


WRITES = ["lora", "said", "bitfit", "layer_norm", "top_k_layers", "far", "random_mask", "prompt", "ladder_side"]


@pytest.mark.parametrize("name", WRITES)
def test_on_a_base_in_bfloat16_leaves_are_float32_and_merging_keeps_bfloat16(name):
    method = jpeft.build([{"method": name, "options": SMALL.get(name, {})}])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pretrained())
    trained, fixed = split(jpeft.init(method, jax.random.key(1), jpeft.sites(MODEL, IDS, MASK), low))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype(np.float32)}
    merged = jpeft.merge(method, tree.union(fixed, trained), low)
    assert {x.dtype for x in jax.tree.leaves(merged.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
def test_merged_folded_and_saved_it_gives_the_same_logits(name, tmp_path):
    method, trained, fixed, now, *_ = make(name)
    leaves, before = tree.union(fixed, trained), jax.tree.map(np.array, pretrained())

    folded = jpeft.fold(method, leaves)
    write_leaves(tmp_path / "x.safetensors", folded)
    again = read_leaves(tmp_path / "x.safetensors")
    chex.assert_trees_all_equal(again, folded)
    rebuilt = jpeft.build([{"method": name, "options": SMALL.get(name, {})}])

    @jax.jit  # both in one program, since compiling is what takes the time
    def run(leaves, again, params):
        merged = jpeft.merge(method, leaves, params)
        return logits(merged.transform, merged.leaves, {}, params=merged.params), logits(rebuilt, again, {})

    of_merged, of_saved = run(leaves, again, pretrained())
    np.testing.assert_allclose(of_merged, now, atol=1e-5 * (1 + np.abs(now).max()))
    np.testing.assert_allclose(of_saved, now, atol=1e-5)
    chex.assert_trees_all_equal(pretrained(), before)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_are_not_the_model_s_are_one_line(name):
    method, leaves = METHODS[name].make(**SMALL.get(name, {})), tree.union(*prepared(name))
    told = r"the parameters have no '\S+': expected"
    if len(stays(method, leaves)) < len(members(method)):
        with pytest.raises(jpeft.UserError, match=told):
            jpeft.merge(method, leaves, {})
    sites = jpeft.sites(MODEL, IDS, MASK)
    try:
        jpeft.init(method, jax.random.key(0), sites, {})  # which not every method reads
    except jpeft.UserError as error:
        assert re.match(told, str(error))  # noqa: PT017


@pytest.mark.parametrize("name", all_but_slow(NAMES, {*NAMES} - {*VARIED}))
def test_the_loop_of_the_readme_cuts_the_loss_by_half_with_the_head_frozen(name):
    """With an optimiser of the user's own; what is fixed, and is not even a float in places, has no part in it."""
    method = METHODS[name].make(**SMALL.get(name, {}))
    trained, fixed = prepared(name)
    parts = jpeft.partition(method, pretrained(), tree.union(fixed, trained))
    rate = 3e-2 if name == "ia3" else 5e-3  # few steps on a small model
    optimizer = optax.chain(optax.adamw(rate, weight_decay=0.01, mask=parts.decays), parts.scale)

    @jax.jit
    def step(trainable, state, key):
        def value(trainable):
            variables = jpeft.union(parts.frozen, trainable)

            def logits(key):
                rngs = {"dropout": key}
                return jpeft.apply(MODEL, method, variables, IDS, MASK, mask=MASK, train=True, rngs=rngs)[0]

            out = logits(key)
            losses = optax.softmax_cross_entropy_with_integer_labels(out, LABELS)
            return (losses + jpeft.penalty(method, out, lambda: logits(jax.random.fold_in(key, 1)))).mean()

        value, grads = jax.value_and_grad(value)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    trainable, state, values = parts.trainable, optimizer.init(parts.trainable), []
    one, same = (step(trainable, state, KEYS[0]) for _ in range(2))
    chex.assert_trees_all_equal(one, same)  # dropout and routing are reproducible by seed
    for key in KEYS:
        trainable, state, value = step(trainable, state, key)
        values.append(float(value))
        if values[-1] < 0.5 * values[0]:
            break
    assert values[-1] < 0.5 * values[0], f"{values[0]:.3f} to {values[-1]:.3f}"
    assert trainable["params"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented_and_its_options_are_json(name):
    factory = METHODS[name].make
    assert "arXiv" in inspect.getdoc(factory) + inspect.getdoc(inspect.getmodule(factory))
    for parameter in inspect.signature(factory).parameters.values():
        assert parameter.default is not parameter.empty
        assert isinstance(parameter.default, int | float | str | bool | tuple | None)


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_counts_all_that_trains(name):
    method, trained, fixed, *_ = make(name)
    rows = jpeft.summary(method, tree.union(fixed, trained), pretrained()).rows
    assert sum(row.trainable for row in rows) == tree.count(trained)
    can_merge = all(member.merge is not None for member in members(method))
    assert (sum(row.added for row in rows) == 0) == can_merge
    assert all(FIXED in path for path in tree.flatten(fixed))
