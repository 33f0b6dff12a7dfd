"""What a training step costs by the length of its rows, and for several seeds together.

    JPEFT_GLUE_DIR=GLUE_FOLDER python third_party/benchmarks/steps.py

LoRA on MiniLM, float32. 768 tokens are cut into rows of several lengths, all timed in turn; and a step of four seeds
together is timed against four steps of one seed, on 16 rows of 48 tokens. Medians of nine rounds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import batches
import jax
import numpy as np

import jpeft
from jpeft.data.batching import Batch
from jpeft.models import Bert
from jpeft.training import optim
from jpeft.training import step as stepping

TOKENS, LENGTHS, ROUNDS, SEEDS = 768, (32, 48, 64, 96, 128), 9, 4


def by_length(base: Any) -> dict[int, float]:
    """Milliseconds of a step on 768 tokens, by the length of their rows."""
    steps = batches.Steps(base)
    shapes = {length: ((TOKENS // length, length),) for length in LENGTHS}
    for shape in shapes.values():
        steps.seconds(shape)  # compiles
    rounds = [{length: steps.seconds(shape) for length, shape in shapes.items()} for _ in range(ROUNDS)]
    return {length: 1000 * statistics.median(each[length] for each in rounds) for length in LENGTHS}


def together(base: Any) -> list[float]:
    """The time of a step of four seeds over that of four steps, in each round."""
    model, ids = Bert(base.config), np.random.default_rng(0).integers(1000, 2000, (SEEDS, 16, 48), np.int32)
    sites, method = jpeft.sites(model, ids[0, :1]), jpeft.chain(jpeft.lora())
    keys = jax.random.split(jax.random.key(0), SEEDS)
    leaves = [jpeft.init(method, key, sites, base.params) for key in keys]
    parts = [jpeft.partition(method, base.params, own, trains=model.HEAD) for own in leaves]
    optimizer = optim.adamw(lambda _: 5e-4, 0.1, parts[0])
    states = [stepping.init_state(own.trainable, optimizer) for own in parts]
    batch = Batch(ids, np.ones_like(ids), 0 * ids, ids[..., 0] % 2, np.ones(ids.shape[:2], np.float32))
    alone = stepping.train_step(model, method, optimizer)
    one, all_ = jax.jit(alone), jax.jit(stepping.together(alone, 0))
    stacked, fixed = stepping.stack(states), stepping.stack([own.frozen["peft"] for own in parts])
    frozen, rows = {**parts[0].frozen, "peft": fixed}, [Batch(*(x[i] for x in batch)) for i in range(SEEDS)]

    def apart() -> None:
        for i in range(SEEDS):
            jax.block_until_ready(one(states[i], parts[i].frozen, rows[i], keys[i]))

    def at_once() -> None:
        jax.block_until_ready(all_(stacked, frozen, batch, keys))

    apart(), at_once()  # compiles
    return [_seconds(at_once) / _seconds(apart) for _ in range(ROUNDS)]


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    _, base = batches.loaded("mrpc")
    found = by_length(base)
    for length, taken in found.items():
        print(f"{TOKENS} tokens in rows of {length}: {taken:.0f} ms, {taken / found[48]:.2f} of rows of 48")
    ratios = sorted(together(base))
    print(
        f"{SEEDS} seeds together: {statistics.median(ratios):.2f} of one after the other "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
