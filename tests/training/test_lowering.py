"""The training step where there is no CPU: lowered for GPUs and TPUs."""

import re

import jax
import jax.export
import numpy as np
import pytest
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
