"""How many bytes cross the network in a training step on eight devices, read from the compiled program.

    python third_party/benchmarks/collectives.py

A random BERT of two layers, 64 wide, on eight devices that XLA makes of one CPU; rows are divided, the base is on each.
"""

import math
import os
import re

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import jpeft
from jpeft.core import tree
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig
from jpeft.training import optim, placement, step

METHODS = {"lora": jpeft.lora(), "mask of entries, as FISH trains": jpeft.random_mask(ratio=0.03)}
COLLECTIVE = re.compile(r"= (.*) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def crossing(program: str) -> int:
    """The bytes of all arrays that collectives of a compiled program give."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(COLLECTIVE.findall(program)))
    return sum(SIZES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)


def main() -> None:
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model, ids, mesh = Bert(config), np.ones((16, 16), np.int32), placement.all_devices()
    assert mesh is not None
    params, sites = model.init(jax.random.key(0), ids)["params"], jpeft.sites(model, ids)
    for name, method in METHODS.items():
        leaves = jpeft.init(method, jax.random.key(1), sites, params)
        parts = jpeft.partition(method, params, leaves, trains=model.HEAD)
        optimizer = optim.adamw(lambda _: 1e-3, 0.1, parts)
        run = jax.jit(step.train_step(model, jpeft.chain(method), optimizer))
        batch = Batch(ids, ids, 0 * ids, np.zeros(16, np.int32), np.ones(16, np.float32))
        state = step.init_state(parts.trainable, optimizer)
        state, key = placement.put((state, jax.random.key(2)), placement.whole(mesh))
        frozen = placement.frozen(mesh, parts.frozen, shard_base=False)
        batch = placement.put(batch, placement.rows(mesh, batch))
        program = run.lower(state, frozen, batch, key).compile().as_text()
        print(f"{name}: {tree.num_bytes(parts.trainable):,} bytes train, {crossing(program):,} cross the network")


if __name__ == "__main__":
    main()
