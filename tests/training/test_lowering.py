"""The training step where there is no CPU: lowered for GPUs and TPUs."""

import re

import jax
import jax.export
import numpy as np
import pytest
from conftest import all_but_slow
from transforms.test_registry import SMALL, VARIED

import jpeft
from jpeft.core.transform import members
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig
from jpeft.models.bert import narrowed
from jpeft.training import optim, step
from jpeft.transforms.registry import METHODS, MODULES

T = 13  # tokens: a size that nothing else has
LOW = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, num_labels=3, dtype="bfloat16",
)  # fmt: skip
ADDED = {"p_tuning": 8, "prompt": 10}  # virtual tokens that lengthen the rows


@pytest.mark.parametrize("name", all_but_slow(MODULES, {*MODULES} - {*VARIED}))
def test_every_method_lowers_for_cuda_and_tpu_with_products_in_bfloat16(name):
    model, ids = Bert(LOW), np.ones((2, T), np.int32)
    sites = jpeft.sites(model, ids)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), ids))
    method = METHODS[name].make(**SMALL.get(name, {}))
    leaves = jpeft.init(method, jax.random.key(1), sites, params["params"])
    parts = jpeft.partition(method, params["params"], leaves, trains=model.HEAD)
    optimizer = optim.adamw(lambda _: 1e-3, 0.01, parts)
    state = jax.eval_shape(lambda trainable: step.init_state(trainable, optimizer), parts.trainable)
    base = parts.frozen["params"]
    wide = any(member.needs_float32 for member in members(method))
    frozen = {**parts.frozen, "params": base if wide else narrowed(base, "bfloat16")}
    batch = Batch(ids, ids, 0 * ids, np.zeros(2, np.int32), np.ones(2, np.float32))
    lowered = jax.export.export(jax.jit(step.train_step(model, method, optimizer)), platforms=("cuda", "tpu"))(
        state, frozen, batch, jax.random.key(2)
    )
    assert lowered.platforms == ("cuda", "tpu")
    # Products over tokens are the encoder's; the head's, and those of the leaves alone, stay float32.
    products = re.findall(r"stablehlo\.dot_general.*: \((tensor<\S+>), (tensor<\S+>)\)", lowered.mlir_module())
    lengths = {T, T + ADDED.get(name, 0)}
    of_tokens = [pair for pair in products if any(lengths & {int(n) for n in re.findall(r"(\d+)x", x)} for x in pair)]
    assert len(of_tokens) >= 10
    assert not [pair for pair in of_tokens if not all(x.endswith("xbf16>") for x in pair)]
    # What is frozen comes as it is computed with: no step makes another copy of it.
    header, body = lowered.mlir_module().split("func.func public @main(")[1].split("func.func")[0].split("\n", 1)
    arguments = dict(re.findall(r"(%arg\d+): tensor<(\S+?)>", header))
    cast = [name for name in re.findall(r"stablehlo\.convert (%arg\d+) ", body) if arguments[name].endswith("bf16")]
    assert not cast
    assert any(x.endswith("xbf16") for x in arguments.values()) != wide


@pytest.mark.parametrize(("name", "same"), [("fish", True), ("dora", False)])
def test_a_base_in_bfloat16_gives_what_casting_it_gives(name, same):
    """But to what computes with the weights themselves, which asks for float32."""
    rng = np.random.default_rng(0)
    model, ids = Bert(LOW), rng.integers(1, 60, (4, T)).astype(np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.1, x.shape).astype(x.dtype), shapes)
    method = METHODS[name].make(**SMALL.get(name, {}))
    parts = jpeft.partition(method, params, jpeft.init(method, jax.random.key(1), jpeft.sites(model, ids), params))
    optimizer = optim.adamw(lambda _: 1e-3, 0.01, parts)
    batch = Batch(ids, np.ones_like(ids), 0 * ids, np.arange(4, dtype=np.int32) % 3, np.ones(4, np.float32))
    training, found = jax.jit(step.train_step(model, method, optimizer)), []
    for base in (parts.frozen["params"], narrowed(parts.frozen["params"], "bfloat16")):
        state = step.init_state(parts.trainable, optimizer)
        for _ in range(2):
            state, measured = training(state, {**parts.frozen, "params": base}, batch, jax.random.key(2))
        found.append((jax.device_get(state.trainable), measured.loss))
    assert jax.tree.all(jax.tree.map(np.array_equal, *found)) == same
    assert any(member.needs_float32 for member in members(method)) != same
