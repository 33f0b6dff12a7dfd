"""What a training step costs: by part, by the length of its rows, for several seeds together, on a quantised base.

    JPEFT_GLUE_DIR=GLUE_FOLDER python third_party/benchmarks/steps.py

LoRA on MiniLM, float32. A step on 16 rows of 48 tokens is timed beside one without dropout, one whose dropout is drawn
by JAX's default generator, a forward pass, and the products with the kernels of all layers alone, forward and backward.
768 tokens are cut into rows of several lengths, all timed in turn; and a step of four seeds together is timed against
four steps of one seed, on 16 rows of 48 tokens. Steps on a quantised base are timed against those on the same base as
it is, of 16 rows whole and in four parts, as `jpeft.data.padding` cuts them. Medians of nine rounds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import batches
import jax
import numpy as np

import jpeft
from jpeft.core.quantised import KINDS
from jpeft.data.batching import Batch
from jpeft.models import Bert
from jpeft.training import draws, optim
from jpeft.training import step as stepping

TOKENS, LENGTHS, ROUNDS, SEEDS = 768, (32, 48, 64, 96, 128), 9, 4
LAYOUTS = {"16 x 48": ((16, 48),), "16 x 128": ((16, 128),), "4 x 32, 40, 56, 96": ((4, 32), (4, 40), (4, 56), (4, 96))}


def by_part(base: Any) -> dict[str, float]:
    """Milliseconds of a step, of others of it, of a forward pass, and of all products with frozen kernels."""
    still = base._replace(
        config=dataclasses.replace(base.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    steps, shape = {"a step": batches.Steps(base), "without dropout": batches.Steps(still)}, ((16, 48),)
    steps["with threefry"] = batches.Steps(base, jax.random.key(0))
    ids = np.random.default_rng(0).integers(1000, 2000, shape[0], np.int32)
    forward, ones = jax.jit(Bert(base.config).apply), np.ones_like(ids)
    kernels = [x for x in jax.tree.leaves(base.params["encoder"]["layer_0"]) if x.ndim == 2]
    rows = {n: np.random.default_rng(n).normal(size=(ids.size, n)).astype(np.float32) for k in kernels for n in k.shape}

    @jax.jit
    def products(kernels: Any, rows: Any) -> Any:
        return [(rows[k.shape[0]] @ k, rows[k.shape[1]] @ k.T) for k in kernels]

    calls = {name: lambda each=each: each.seconds(shape) for name, each in steps.items()}
    calls["a forward pass"] = lambda: _seconds(
        lambda: jax.block_until_ready(forward({"params": base.params}, ids, ones, 0 * ids))
    )
    calls["products alone"] = lambda: (
        base.config.num_hidden_layers * _seconds(lambda: jax.block_until_ready(products(kernels, rows)))
    )
    rounds = [{name: call() for name, call in calls.items()} for _ in range(ROUNDS + 1)][1:]  # the first one compiles
    return {name: 1000 * statistics.median(each[name] for each in rounds) for name in calls}


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
    drops = draws.dropout_key(keys)
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
            jax.block_until_ready(one(states[i], parts[i].frozen, rows[i], drops[i]))

    def at_once() -> None:
        jax.block_until_ready(all_(stacked, frozen, batch, drops))

    apart(), at_once()  # compiles
    return [_seconds(at_once) / _seconds(apart) for _ in range(ROUNDS)]


def quantised(base: Any) -> dict[tuple[str, str], list[float]]:
    """The time of a step on a quantised base over that of one on the base as it is, by kind and layout, sorted."""
    sites = jpeft.sites(Bert(base.config), np.ones((1, 8), np.int32))
    bases = {kind: base._replace(params=jpeft.quantise(base.params, sites, kind)) for kind in KINDS}
    steps = {kind: batches.Steps(each) for kind, each in {"": base, **bases}.items()}
    found: dict[tuple[str, str], list[float]] = {}
    for name, shapes in LAYOUTS.items():
        for each in steps.values():
            each.seconds(shapes)  # compiles
        rounds = [{kind: each.seconds(shapes) for kind, each in steps.items()} for _ in range(ROUNDS)]
        found |= {(kind, name): sorted(took[kind] / took[""] for took in rounds) for kind in KINDS}
    return found


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    _, base = batches.loaded("mrpc")
    taken = by_part(base)
    for name, one in taken.items():
        print(f"{name}: {one:.0f} ms, {one / taken['a step']:.2f} of a step")
    found = by_length(base)
    for length, taken in found.items():
        print(f"{TOKENS} tokens in rows of {length}: {taken:.0f} ms, {taken / found[48]:.2f} of rows of 48")
    ratios = sorted(together(base))
    print(
        f"{SEEDS} seeds together: {statistics.median(ratios):.2f} of one after the other "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    for (kind, name), ratios in quantised(base).items():
        print(
            f"{kind}, batch of {name}: {statistics.median(ratios):.2f} of float32 ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
