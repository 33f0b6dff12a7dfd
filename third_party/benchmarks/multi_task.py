"""What mixing costs: a batch whose rows belong to 16 tasks against one whose rows all belong to one, in turn.

    python third_party/benchmarks/multi_task.py [--processor]

MiniLM, batches of 32 rows of 64 tokens, modules with random leaves. One task, a LoRA of rank 8, is timed in the program
of `jpeft.predict`, 16 tasks in that of `jpeft.MultiTask`. Both are timed in every pair; the ratio is the median one.
With --processor it is the time of the processors, which other work on the machine disturbs less.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.data.batching import Batch
from jpeft.models import Bert, pretrained
from jpeft.serving import multi_task, prediction

ROWS, LENGTH, TASKS, PAIRS, STEPS = 32, 64, 16, 5, 3
CLOCK = time.process_time if "--processor" in sys.argv else time.perf_counter
LORAS = [jpeft.lora(rank=rank) for rank in (4, 8, 16)]
MIXES = {
    "one task, rank 8": [LORAS[1]],
    "LoRA, ranks 4, 8, 16": LORAS,
    "LoRA, pfeiffer, prefix, ia3": [LORAS[1], jpeft.pfeiffer(), jpeft.prefix(), jpeft.ia3()],
}


def tasks(methods: list[jpeft.Transform]) -> list[jpeft.Saved]:
    loaded = pretrained.load("minilm", num_labels=2, key=jax.random.key(0))
    model, rng = Bert(loaded.config), np.random.default_rng(0)
    sites = jpeft.sites(model, jax.ShapeDtypeStruct((1, 8), "int32"))

    def make(i: int) -> jpeft.Saved:
        method = jpeft.chain(methods[i % len(methods)])
        leaves = jpeft.fold(method, jpeft.init(method, jax.random.key(i), sites, loaded.params))
        leaves = jax.tree.map(lambda x: x + 0.01 * rng.normal(size=x.shape).astype(x.dtype), leaves)
        variables = {"params": loaded.params, "peft": leaves}
        return jpeft.Saved(model, method, variables, ("no", "yes"), str(i), LENGTH, None, 1, Path(), {})

    return [make(i) for i in range(TASKS)]


def seconds(fn: Any, *args: Any) -> float:
    start = CLOCK()
    for _ in range(STEPS):
        jax.block_until_ready(fn(*args))
    return (CLOCK() - start) / STEPS


def ratio(methods: list[jpeft.Transform]) -> tuple[float, float, float]:
    """Milliseconds a batch of one task (a LoRA of rank 8), and of all; rows per second of the second, of the first."""
    rng, (one,) = np.random.default_rng(0), tasks(LORAS[1:2])[:1]
    ids = rng.integers(1000, 20000, (ROWS, LENGTH), np.int32)
    batch = Batch(ids, np.ones_like(ids), np.zeros_like(ids), np.arange(ROWS, dtype=np.int32) % TASKS, None)
    many = jpeft.MultiTask({str(i): saved for i, saved in enumerate(tasks(methods))})
    model, base, stacks = many._stacked()
    alone = prediction._forward, one.model, one.transform, {"params": {}, "peft": {}}, one.variables, batch
    mixed = multi_task._answer, model, many._transform, base, stacks, batch
    seconds(*alone), seconds(*mixed)  # compiles
    pairs = [(seconds(*alone), seconds(*mixed)) for _ in range(PAIRS)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    return 1e3 * first, 1e3 * second, statistics.median(a / b for a, b in pairs)


def main() -> None:
    print("| 16 tasks | one task, ms | mixed, ms | rows per second, mixed of one |")
    print("| --- | ---: | ---: | ---: |")
    for name, methods in MIXES.items():
        one, mixed, share = ratio(methods)
        print(f"| {name} | {one:.0f} | {mixed:.0f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
