"""Tangent kernels of a tiny run, against gradients of one logit at a time."""

import types

import jax
import numpy as np
import pytest

from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.data import batching
from jpeft.data.kinds import KINDS
from jpeft.plans import gains
from jpeft.plans import plan as plans
from jpeft.run import checks, kernels, loading, measuring
from jpeft.run.console import Console
from jpeft.run.seed import begin
from jpeft.training.step import single_logits

QUIET = Console(quiet=True)
PREFIX = plans.Entry("prefix", {"num_virtual_tokens": 2, "mlp_hidden": 3})  # with leaves that all layers share


@pytest.fixture
def seed(tiny_config, tmp_path):
    config = tiny_config("fishpal", "mrpc", num_epochs=1, max_length=8)
    config.fishpal.update(criterion="kernel", num_examples=8)
    checks.check(config)
    return begin(config, 11, *loading.load(config, QUIET)[:2], tmp_path, QUIET)


@pytest.mark.parametrize("entry", [plans.Entry("lora", {"rank": 2}), PREFIX])
def test_a_kernel_is_made_of_products_of_gradients(seed, entry, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 2)
    method, leaves = measuring.alone(seed, entry)
    part, fixed = split(leaves)
    examples = batching.take(seed.data.train, range(3))
    batch = batching.together(examples, (8,))
    rest, logits = {"params": seed.base.params, "peft": fixed}, single_logits(seed.model, method)
    scale = jax.tree.map(lambda x: np.random.default_rng(x.size).uniform(0.5, 2, x.shape).astype(np.float32), part)
    found = kernels.kernels(jax.jit(kernels.features(logits))(part, scale, batch, rest))
    assert list(found) == [0, 1]
    one = jax.jit(jax.grad(lambda tree, example, c: logits({"peft": tree}, example, rest)[c]))
    rows = []
    for i in range(3):
        for c in range(2):
            gradient = one(part, jax.tree.map(lambda x, i=i: x[i], batch), c)
            rows.append(jax.tree.map(lambda g, s: np.float64(g) * s, gradient, scale))
    whole = np.array([[sum(gains.by_layer(jax.tree.map(np.multiply, x, y)).values()) for y in rows] for x in rows])
    np.testing.assert_allclose(sum(found.values()), whole, rtol=1e-4, atol=1e-6 * abs(whole).max())
    first = np.array([[gains.by_layer(jax.tree.map(np.multiply, x, y))[0] for y in rows] for x in rows])
    np.testing.assert_allclose(found[0], first, rtol=1e-4, atol=1e-6 * abs(whole).max())


def test_a_sketch_keeps_products(monkeypatch):
    monkeypatch.setattr(kernels, "SKETCH", 4096)
    rows = np.random.default_rng(1).normal(size=(4, 50_000)).astype(np.float32)
    rows[1] += rows[0]
    sketch = np.asarray(kernels._sketched(rows))
    assert sketch.shape == (4, 4096)
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(sketch @ sketch.T, rows @ rows.T, atol=4 / np.sqrt(4096) * lengths.max() ** 2)
    few = rows[:, :4096]
    assert kernels._sketched(few) is few


def test_adam_moves_an_entry_by_its_rate_over_the_size_of_its_gradient():
    mean, square = np.array([0.1, 0.0, 0.3]), np.array([0.05, 0.0, 0.09])
    found = kernels.preconditioner(gains.Moments({"x": mean}, {"x": square}, 5), lambda path: 0.01, 16)["x"]
    variance = 0.04 * 5 / 4
    np.testing.assert_allclose(found**2, [0.01 / np.sqrt(0.01 + variance / 16), 0, 0.01 / 0.3], rtol=1e-5)


@pytest.mark.slow
def test_a_prediction_of_a_plan_is_the_one_that_chose(seed):
    entries = {"prefix": PREFIX, "lora": plans.Entry("lora", {"rank": 2})}
    found = kernels.by_kernel(seed, entries)
    assert [list(row) for row in found.scores.values()] == [["prefix", "lora"]] * 2
    chosen = {layer: max(row, key=row.get) for layer, row in found.scores.items()}
    said = {names: found.predict(dict(enumerate(names))) for names in [(a, b) for a in entries for b in entries]}
    assert said[tuple(chosen.values())] >= max(said[name, name] for name in entries)
    lost = {layer: name for layer, name in chosen.items() if layer != 0}
    gain = said[tuple(chosen.values())] - found.predict(lost)
    assert found.scores[0][chosen[0]] == pytest.approx(gain)
    assert found.passes == pytest.approx(45 / 3 + 2 * 8 * (1 + 5 / 3))
    ready = measuring.prepare(seed, 8)  # without modules nothing moves, not even by a prefix that is random at first
    loss = [_loss(seed, ready.params, half) for half in (ready.a, ready.b)]
    assert found.predict({}) == pytest.approx(-np.mean(loss), rel=1e-5)


def _loss(seed, params, examples):
    batch = batching.together(examples, (8,))
    logits, _ = seed.model.apply({"params": params}, batch.input_ids, batch.attention_mask, batch.token_type_ids)
    return float(seed.data.task.loss(logits, batch.labels).mean())


def test_tagging_has_no_kernel(seed):
    task = types.SimpleNamespace(kind="tagging", answers=KINDS["tagging"])
    with pytest.raises(UserError, match="needs one answer a row, not tagging: expected 'race'"):
        kernels.by_kernel(seed._replace(data=seed.data._replace(task=task)), {})
