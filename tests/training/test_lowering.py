"""The training step where there is no CPU: lowered for GPUs and TPUs, and run on several devices."""

import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from conftest import CHEAP
from transforms.test_registry import SMALL

import jpeft
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig
from jpeft.training import optim, step
from jpeft.transforms.registry import METHODS, MODULES

T = 13  # tokens: a size that nothing else has
LOW = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, num_labels=3, dtype="bfloat16",
)  # fmt: skip
ADDED = {"p_tuning": 8, "prompt": 20}  # virtual tokens that lengthen the rows


@pytest.mark.parametrize("name", MODULES)
def test_every_method_lowers_for_cuda_and_tpu_with_products_in_bfloat16(name):
    model, ids = Bert(LOW), np.ones((2, T), np.int32)
    sites = jpeft.sites(model, ids)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), ids))
    method = METHODS[name].make(**SMALL.get(name, {}))
    leaves = jpeft.init(method, jax.random.key(1), sites, params["params"])
    parts = jpeft.partition(method, params["params"], leaves, trains=model.HEAD)
    optimizer = optim.adamw(lambda _: 1e-3, 0.01, parts)
    state = jax.eval_shape(lambda trainable: step.init_state(trainable, optimizer), parts.trainable)
    batch = Batch(ids, ids, 0 * ids, np.zeros(2, np.int32), np.ones(2, np.float32))
    lowered = jax.export.export(jax.jit(step.train_step(model, method, optimizer)), platforms=("cuda", "tpu"))(
        state, parts.frozen, batch, jax.random.key(2)
    )
    assert lowered.platforms == ("cuda", "tpu")
    # Products over tokens are the encoder's; the head's, and those of the leaves alone, stay float32.
    products = re.findall(r"stablehlo\.dot_general.*: \((tensor<\S+>), (tensor<\S+>)\)", lowered.mlir_module())
    lengths = {T, T + ADDED.get(name, 0)}
    of_tokens = [pair for pair in products if any(lengths & {int(n) for n in re.findall(r"(\d+)x", x)} for x in pair)]
    assert len(of_tokens) >= 10
    assert not [pair for pair in of_tokens if not all(x.endswith("xbf16>") for x in pair)]


SHARDED = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests")
from training.test_loop import DATA, METHOD, MODEL, OPTIMIZER
import jpeft
from jpeft.data.batching import train_batches
from jpeft.training import step
assert jax.device_count() == 8
x = np.ones((1, 8), np.int32)
params = MODEL.init(jax.random.key(0), x)["params"]
leaves = jpeft.init(METHOD, jax.random.key(1), jpeft.sites(MODEL, x), params)
parts = jpeft.partition(METHOD, params, leaves, trains="classifier")
state, run = step.init_state(parts.trainable, OPTIMIZER), jax.jit(step.train_step(MODEL, METHOD, OPTIMIZER))
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
one, many = state, jax.device_put(state, whole)
frozen, key = jax.device_put(parts.frozen, whole), jax.device_put(jax.random.key(2), whole)
for batch in train_batches(DATA.train, 8, DATA.buckets, 0, 1):
    one, a = run(one, parts.frozen, batch, jax.random.key(2))
    many, b = run(many, frozen, jax.device_put(batch, rows), key)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
# Where a gradient is rounding error, Adam's step may differ: by at most two steps' length.
for x, y in zip(jax.tree.leaves(one.trainable), jax.tree.leaves(many.trainable)):
    np.testing.assert_allclose(x, y, atol=2e-3)
print("same on", len(many.trainable["params"]["classifier"]["kernel"].sharding.device_set), "devices")
"""


def test_a_step_on_eight_devices_is_that_on_one(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {CHEAP}")
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "same on 8 devices" in done.stdout
