"""Times Fisher information and sparse training against PyTorch's loop and against plain gradients, in turn.

    make benchmark                                                       # installs PyTorch in an environment of its own
    python third_party/benchmarks/fisher.py --torch .venv-parity-transformers/bin/python --glue GLUE_FOLDER

MiniLM, 128 rows of MNLI's training data, all CPU cores for both sides. Each figure is the median of pairs measured one
after the other; the time to compile is told apart.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.core import files, tree
from jpeft.data import batching, padding, tasks
from jpeft.data.task import example_losses
from jpeft.importance import per_example
from jpeft.models import Bert, pretrained
from jpeft.plans.plan import make
from jpeft.training import optim
from jpeft.training import step as stepping

fishing = sys.modules["jpeft.importance.fisher"]
NUM, BATCH, FULL = 128, 8, 128


def load(glue: str) -> tuple[Bert, Any, batching.Examples, Path]:
    from transformers import AutoTokenizer

    base = pretrained.load("minilm", num_labels=3, key=jax.random.key(0))
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    rows = tasks.task("mnli").encode(tasks.load("mnli", glue).splits["train"], tokenizer, FULL)
    return Bert(base.config), base, batching.sample(rows, NUM, seed=11)[0], base.folder


class Torch:
    """The other side, in a process of its own."""

    def __init__(self, python: str, folder: Path, data: Path):
        script = Path(__file__).with_name("torch_fisher.py")
        self._process = subprocess.Popen(
            [python, script, folder, data, str(len(os.sched_getaffinity(0)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        assert self._process.stdout.readline().strip() == "ready"

    def seconds(self, what: str) -> float:
        """The time of one pass."""
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def rounds(fn: Any, part: Any, groups: list[Any], rest: Any, **options: Any) -> Iterator[float]:
    """The seconds of one pass over all examples after the other; the first one compiles."""
    sums = fishing.accumulate(fn, part, groups * 100, rest, grouped=True, **options)
    while True:
        start = time.perf_counter()
        running = next(sums)
        while running.done % NUM:
            running = next(sums)
        jax.block_until_ready(running.parts)
        yield time.perf_counter() - start


def gradients(model: Bert, method: Any, part: Any, rest: Any, batches: list[Any]) -> Callable[[], float]:
    """The seconds of plain gradient steps over the same examples."""

    def loss(part: Any, batch: Any, rest: Any) -> Any:
        return example_losses(stepping.forward(model, method, part, rest, batch), batch.labels).sum()

    grad = jax.jit(jax.grad(loss))

    def seconds() -> float:
        start = time.perf_counter()
        for batch in batches:
            found = grad(part, batch, rest)
        jax.block_until_ready(found)
        return time.perf_counter() - start

    seconds()
    return seconds


def ratios(one: Callable[[], float], other: Callable[[], float], pairs: int) -> str:
    found = [one() / other() for _ in range(pairs)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", required=True, help="folder with mnli/train.jsonl[.gz]")
    parser.add_argument("--torch", help="a Python with PyTorch and transformers; without it that side is left out")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args(argv)
    model, base, rows, folder = load(args.glue)
    params, empty = base.params, jpeft.chain()
    natural = padding.length_buckets(rows.lengths)
    everything = {"params": params, "peft": {}}
    loss, logits = stepping.single_loss(model, empty), stepping.single_logits(model, empty)
    lines: list[tuple[str, str, str]] = []

    def say(what: str, found: str, limit: str = "") -> None:
        print(f"{what}: {found}" + (f" (wanted: {limit})" if limit else ""), flush=True)
        lines.append((what, found, limit))

    for name, buckets, limit in (("natural lengths", natural, 2.0), (f"length {FULL}", (FULL,), 1.5)):
        groups, _ = batching.by_length(rows, buckets)
        batches = [batch for batch, _ in batching.eval_batches(rows, BATCH, buckets)]
        passes = rounds(loss, everything, groups, {})
        say(f"first pass, compiling included, {name}", f"{next(passes):.1f} s")
        plain = gradients(model, empty, everything, {}, batches)
        say(f"over plain gradients, all parameters, {name}", ratios(lambda p=passes: next(p), plain, args.pairs),
            f"at most {limit}")  # fmt: skip
        if name == "natural lengths":
            own = passes
    if args.torch:
        with tempfile.TemporaryDirectory() as scratch:
            batch = next(iter(batching.eval_batches(rows, NUM, (FULL,))))[0]
            data = Path(scratch) / "data.npz"
            np.savez(data, ids=batch.input_ids, mask=batch.attention_mask, types=batch.token_type_ids,
                     labels=batch.labels)  # fmt: skip
            pretrained.save(Path(scratch) / "model", base.config, params, tokenizer_from=folder)
            torch = Torch(args.torch, Path(scratch) / "model", data)
            check = Path(scratch) / "check.npz"
            torch.seconds(f"natural {check}")
            groups, _ = batching.by_length(rows, natural)
            found = jpeft.fisher(loss, everything, groups, {}, grouped=True)["params"]["encoder"]["layer_0"]["ffn"][
                "output"
            ]
            theirs = np.load(check)["bert.encoder.layer.0.output.dense.weight"].T
            error = np.linalg.norm(theirs - found["kernel"]) / np.linalg.norm(theirs)
            say("difference of one kernel's information from PyTorch's", f"{error:.1e}", "at most 1e-4")
            for what, limit in (("padded", 3.0), ("natural", 1.3)):
                torch.seconds(what)
                each = ratios(lambda w=what: torch.seconds(w), lambda: next(own), args.pairs)
                say(f"times as fast as PyTorch's loop, {what}", each, f"at least {limit}")
    exactness(base, rows, say)
    groups, _ = batching.by_length(rows, natural)
    batches = [batch for batch, _ in batching.eval_batches(rows, BATCH, natural)]
    expected = rounds(logits, everything, groups, {}, labels="expected")
    next(expected)
    say("expected over empirical, 3 classes", ratios(lambda: next(expected), lambda: next(own), args.pairs),
        f"at most {1.15 * 7 / 3:.2f}")  # fmt: skip
    sites = jpeft.sites(model, jnp.ones((1, 8), "int32"))
    for names in (("lora",), ("prefix", "pfeiffer", "lora")):
        method = jpeft.chain(*map(make, names))
        leaves, rest = {"peft": jpeft.init(method, jax.random.key(0), sites)}, {"params": params}
        passes = rounds(stepping.single_loss(model, method), leaves, groups, rest)
        next(passes)
        plain = gradients(model, method, leaves, rest, batches)
        say(f"over plain gradients, {' + '.join(names)}", ratios(lambda p=passes: next(p), plain, args.pairs),
            "at most 1.3")  # fmt: skip
    memory(loss, everything, groups[-1], say)
    sparse(model, params, sites, batches[-1], args.pairs, say)
    print("\n| | measured | wanted |\n| --- | ---: | ---: |")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def exactness(base: Any, rows: batching.Examples, say: Callable) -> None:
    """The largest difference of a leaf from the definition, a loop over single examples, relative to its norm.

    The biases of the keys are left out: no logit depends on them, so that their information is rounding error.
    """
    few, key = batching.take(rows, np.arange(8)), jax.random.key(1)
    groups, _ = batching.by_length(few, padding.length_buckets(few.lengths, max_buckets=2))
    for dtype, limit in (("float32", 1e-5), ("float64", 1e-9)):
        with jax.enable_x64(dtype == "float64"):
            params = jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), base.params)
            model = Bert(dataclasses.replace(base.config, dtype=dtype))
            loss, logits = (f(model, jpeft.chain()) for f in (stepping.single_loss, stepping.single_logits))
            part = {"params": params, "peft": {}}
            singles = [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), g) for g in groups for i in range(len(g.labels))]
            predicted = [jax.jit(logits)(part, example, {}) for example in singles]
            drawn = [jax.random.categorical(jax.random.fold_in(key, i), out) for i, out in enumerate(predicted)]
            terms = {
                "empirical": [[(1.0, example.labels)] for example in singles],
                "expected": [list(zip(jax.nn.softmax(out), range(3), strict=True)) for out in predicted],
                "sampled": [[(1.0, label)] for label in drawn],
            }
            for labels, values in [(name, "square") for name in terms] + [("empirical", "absolute")]:
                wanted = looped(logits, part, singles, terms[labels], np.square if values == "square" else np.abs)
                fn = loss if labels == "empirical" else logits
                got = jpeft.fisher(fn, part, groups, {}, grouped=True, labels=labels, values=values, key=key)
                pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True)
                errors = [
                    float(np.linalg.norm(a - b) / np.linalg.norm(b))
                    for (path, a), b in pairs
                    if "['key']['bias']" not in jax.tree_util.keystr(path)
                ]
                say(
                    f"difference from a loop, {labels}, {values}, {dtype}", f"{max(errors):.1e}", f"at most {limit:.0e}"
                )


def looped(logits: Any, part: Any, singles: list[Any], terms: list[Any], measure: Callable) -> Any:
    """The mean over examples of sum_c weight_c measure(d log p(c) / d part), one gradient at a time."""
    gradient = jax.jit(jax.grad(lambda part, example, c: jax.nn.log_softmax(logits(part, example, {}))[c]))
    total = jax.tree.map(lambda x: np.zeros(x.shape), part)
    for example, own in zip(singles, terms, strict=True):
        for weight, c in own:
            found = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient(part, example, c))
            total = jax.tree.map(lambda t, g, w=float(weight): t + w * measure(g) / len(singles), total, found)
    return total


def memory(loss: Any, part: Any, batch: Any, say: Callable) -> None:
    """What XLA plans for one microbatch."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    number = jax.ShapeDtypeStruct((), "int32")
    one = fishing._one(loss, "empirical", jax.random.key(0))
    step, most, constants = fishing._compiled(one, loss, part, shapes, ({},), "empirical", jnp.square, None, None, None)
    chunk = jax.tree.map(lambda x: jax.ShapeDtypeStruct((most, *x.shape), x.dtype), (shapes, number))
    plan = step.lower(part, part, chunk, jnp.ones(most), ({},), constants).compile().memory_analysis()
    cut = per_example.cut(one, part, (shapes, number), ({},), 1)
    held = 2 * tree.num_bytes(part)
    limit = 1.25 * held + most * per_example.bytes_per_example(cut, one_by_one=True)
    peak = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    say(f"planned memory, all parameters, {most} examples of {batch.input_ids.shape[1]} tokens", f"{peak / 1e6:.0f} MB",
        f"at most {limit / 1e6:.0f} MB: base and Fisher {held / 1e6:.0f} MB, a quarter more, activations")  # fmt: skip


def sparse(model: Bert, params: Any, sites: Any, batch: Any, pairs: int, say: Callable) -> None:
    """FISH's training step at 0.5 % against full fine-tuning's; a random choice, which costs the same."""
    steps, plans, key = {}, {}, jax.random.key(0)
    for name, method in (("full", jpeft.chain()), ("fish", jpeft.chain(jpeft.fish(0.005)))):
        leaves, fixed = jpeft.core.partition.split(jpeft.init(method, jax.random.key(0), sites, params))
        trained, rest = tree.split(params, lambda path, n=name: n == "full" or path[0] == "classifier")
        trainable, frozen = {"params": trained, "peft": leaves}, {"params": rest, "peft": fixed}
        optimizer = optim.adamw(optax.constant_schedule(1e-5), 0.0)
        state = stepping.init_state(trainable, optimizer)
        step = jax.jit(stepping.train_step(model, method, optimizer), donate_argnums=0)
        compiled = step.lower(state, frozen, batch, key).compile()
        plan = compiled.memory_analysis()
        plans[name] = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        if name == "fish":
            k = tree.count(trainable)
            say(
                f"optimiser state over k = {k:,} trained entries",
                f"{tree.count(state.opt_state) / k:.3f} k",
                "at most 2.2 k",
            )
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "modules.safetensors"
                files.write_leaves(path, tree.union({"peft": fixed}, trainable))
                say("file per trained entry", f"{path.stat().st_size / k:.2f} bytes", "at most 8.2 bytes")
        holder = [state]

        def run(compiled: Any = compiled, frozen: Any = frozen, holder: list = holder) -> float:
            start = time.perf_counter()
            for _ in range(3):
                holder[0], metrics = compiled(holder[0], frozen, batch, key)
            jax.block_until_ready(metrics)
            return time.perf_counter() - start

        run()
        steps[name] = run
    say("FISH's training step over full fine-tuning's", ratios(steps["fish"], steps["full"], pairs), "at most 1.1")
    say("planned memory of FISH's step over full fine-tuning's", f"{plans['fish'] / plans['full']:.2f}", "below 1")


if __name__ == "__main__":
    main(sys.argv[1:])
