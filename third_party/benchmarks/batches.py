"""What padding costs: tokens by task, and steps of LoRA in the layouts of a run against steps at one length, in turn.

    JPEFT_GLUE_DIR=GLUE_FOLDER python third_party/benchmarks/batches.py

MiniLM, batches of 16, at most 64 tokens, layouts as a run of ten epochs chooses them on this machine. Each shape of a
batch is timed once in every round, and weighed by how often an epoch has it.
"""

import statistics
import time
from collections import Counter
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.data import batching
from jpeft.data.batching import Batch
from jpeft.models import Bert
from jpeft.run import glue, loading
from jpeft.run.console import Console
from jpeft.training import draws, optim
from jpeft.training import step as stepping

TASKS, TIMED, ROUNDS, STEPS = ("mrpc", "mnli", "qqp", "stsb", "cola", "sst2"), ("mrpc", "mnli", "cola"), 7, 3

Shapes = tuple[tuple[int, int], ...]  # rows and length of each part


def loaded(task: str) -> tuple[Any, Any]:
    config = glue.get_config(f"lora,{task}")
    config.model, config.train.max_length, config.train.num_epochs = "minilm", 64, 10
    data, base, _ = loading.load(config, Console(quiet=True))
    return data, base


def padding_of(data: Any) -> tuple[Counter[Shapes], float, float, float]:
    """How often an epoch has which shapes; padded over real tokens in layouts, at one length, at each longest row."""
    shapes: Counter[Shapes] = Counter()
    longest = 0
    for parts in batching.train_batches(data.train, data.layouts, seed=11, epoch=1):
        shapes[tuple(part.input_ids.shape for part in parts)] += 1
        longest += data.batch_size * max(int(part.attention_mask.sum(1).max()) for part in parts)
    real, steps = data.train.lengths.sum(), sum(shapes.values())
    layouts = sum(n * sum(rows * length for rows, length in parts) for parts, n in shapes.items())
    return shapes, layouts / real, steps * data.batch_size * data.longest / real, longest / real


class Steps:
    """LoRA's training step, compiled for shapes of batches of random tokens."""

    def __init__(self, base: Any, key: jax.Array | None = None):
        model, x = Bert(base.config), jax.numpy.ones((1, 8), int)
        method = jpeft.chain(jpeft.lora())
        leaves = jpeft.init(method, jax.random.key(0), jpeft.sites(model, x), base.params)
        parts = jpeft.partition(method, base.params, leaves, trains=model.HEAD)
        optimizer = optim.adamw(lambda _: 5e-4, 0.1, parts)
        self._args = stepping.init_state(parts.trainable, optimizer), parts.frozen
        self._step = jax.jit(stepping.train_step(model, method, optimizer))
        self._key = draws.dropout_key(jax.random.key(0)) if key is None else key

    def seconds(self, shapes: Shapes) -> float:
        """The time of a step; the first call compiles."""
        rng = np.random.default_rng(0)
        batch = []
        for rows, length in shapes:
            ids = rng.integers(1000, 2000, (rows, length), np.int32)
            labels = rng.integers(0, 2, rows, np.int32)
            batch.append(Batch(ids, np.ones_like(ids), np.zeros_like(ids), labels, np.ones(rows, np.float32)))
        start = time.perf_counter()
        for _ in range(STEPS):
            done = self._step(*self._args, tuple(batch), self._key)
        jax.block_until_ready(done)
        return (time.perf_counter() - start) / STEPS


def main() -> None:
    print("| task | layouts | one length | longest row of each batch | steps, against one length |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for task in TASKS:
        data, base = loaded(task)
        shapes, layouts, one, longest = padding_of(data)
        told = ""
        if task in TIMED:
            steps, alone = Steps(base), ((data.batch_size, data.longest),)
            for each in {alone, *shapes}:
                steps.seconds(each)
            total = shapes.total()
            ratios = []
            for _ in range(ROUNDS):
                once = {each: steps.seconds(each) for each in {alone, *shapes}}
                ratios.append(once[alone] / (sum(n * once[each] for each, n in shapes.items()) / total))
            told = f"{statistics.median(ratios):.2f}"
        print(f"| {task} | {layouts:.2f} | {one:.2f} | {longest:.2f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
