"""Times training and evaluation with LoRA against Hugging Face `peft` in PyTorch, on the same rows of GLUE, in turn.

    JPEFT_GLUE_DIR=GLUE_FOLDER python third_party/benchmarks/training.py --torch .venv-parity-peft/bin/python

MiniLM, LoRA of rank 8, batches of 16, at most 128 tokens, float32, dropout on, with as many threads on both sides.
jpeft trains as a run does: on random batches, padded in parts, or on batches of similar length
(`config.train.group_by_length`). PyTorch pads each batch to its longest row, with random batches, as most of its users
have them, or with rows grouped by length, as `train_sampling_strategy` of its trainer groups them. Timed are the steps
alone, without loading and compiling; evaluation has sorted rows on both sides. Figures are medians of the pairs, in
useful examples a second.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import jpeft
from jpeft.data import batching
from jpeft.models import Bert
from jpeft.run import experiment, glue, loading
from jpeft.run.console import Console
from jpeft.training import draws, optim
from jpeft.training import step as stepping
from jpeft.training.compiled import Steps, prepare
from jpeft.training.loop import evaluate

KINDS = {  # whether ours are grouped, and how theirs are drawn
    "random batches on both sides": (False, "random"),
    "PyTorch's grouped by length": (False, "grouped"),
    "grouped by length on both sides": (True, "grouped"),
}
GIGABYTE = 1e6 if sys.platform == "linux" else 1e9  # of what the system counts memory in


class Ours:
    """LoRA's training, as a run sets it up."""

    def __init__(self, data: Any, base: Any, full: bool):
        model = Bert(base.config)
        sites = jpeft.sites(model, jax.ShapeDtypeStruct((1, data.longest), "int32"))
        method = jpeft.chain() if full else jpeft.chain(jpeft.lora())
        leaves = jpeft.init(method, jax.random.key(0), sites, base.params)
        parts = jpeft.partition(method, base.params, leaves, trains=base.params if full else model.HEAD)
        optimizer = optim.adamw(lambda _: 5e-4, 0.1, parts)
        training = stepping.train_step(model, method, optimizer, data.task.loss)
        self._steps = Steps.compiled(training, stepping.eval_step(model, method))
        self._state, self._frozen = stepping.init_state(parts.trainable, optimizer), parts.frozen
        self._data, self._key = data, draws.dropout_key(jax.random.key(1))
        prepare(self._steps, self._state, self._frozen, data, self._key)
        self._batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        for epoch in itertools.count(1):
            data = self._data
            yield from batching.train_batches(data.train, data.layouts, 11, epoch, grouped=data.grouped)

    def train(self, steps: int) -> float:
        """Examples a second over so many steps."""
        start = time.perf_counter()
        for batch in itertools.islice(self._batches, steps):
            self._state, measured = self._steps.train(self._state, self._frozen, batch, self._key)
        jax.block_until_ready(measured.loss)
        return steps * self._data.batch_size / (time.perf_counter() - start)

    def evaluate(self) -> float:
        """Examples a second over the evaluation split."""
        start = time.perf_counter()
        evaluate(self._steps.eval, self._state.trainable, self._frozen, self._data.dev, self._data.eval_buckets)
        return self._data.dev.size / (time.perf_counter() - start)


class Torch:
    """The other side, in a process of its own."""

    def __init__(self, python: str, given: Path, threads: int):
        environ = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        command = [python, str(Path(__file__).with_name("torch_training.py")), str(given), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        if self.ask() != "ready":
            raise SystemExit("PyTorch's side did not start")

    def ask(self, *what: str | int) -> str:
        """Sends a line, if there is one, and returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if what:
            self._process.stdin.write(" ".join(map(str, what)) + "\n")
            self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def told(name: str, pairs: list[tuple[float, float]]) -> str:
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return f"| {name} | {ours:.1f} | {theirs:.1f} | {statistics.median(ratios):.2f} ({spread}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="a Python with requirements-peft.txt")
    parser.add_argument("--tasks", nargs="+", default=["mnli", "sst2", "mrpc"])
    parser.add_argument("--full", action="store_true", help="full fine-tuning in the place of LoRA")
    parser.add_argument("--steps", type=int, default=24, help="of a timed stretch")
    parser.add_argument("--pairs", type=int, default=5, help="timed stretches of each side")
    parser.add_argument("--rows", type=int, default=1000, help="to evaluate on; 0 leaves evaluation out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch; JAX takes all")
    args = parser.parse_args()
    experiment.use_compilation_cache()
    print("| task | jpeft, examples a second | PyTorch | times as fast, median (range) |")
    print("| --- | ---: | ---: | ---: |")
    for task in args.tasks:
        config = glue.get_config(f"{'full' if args.full else 'lora'},{task}")
        config.model, config.train.max_train_examples = "minilm", 4000
        both = {}
        for grouped in (False, True):
            config.train.group_by_length = grouped
            data, base, _ = loading.load(config, Console(quiet=True))
            if args.rows:
                data = data._replace(dev=batching.take(data.dev, range(min(args.rows, data.dev.size))))
            both[grouped] = Ours(data, base, args.full)
        with tempfile.TemporaryDirectory() as folder:
            rows = {
                name: {
                    "ids": [x.tolist() for x in each.input_ids],
                    "types": [x.tolist() for x in each.token_type_ids],
                    "labels": each.labels.tolist(),
                }
                for name, each in (("train", data.train), ("dev", data.dev))
            }
            given = Path(folder) / "rows.json"
            about = {"model": str(base.folder), "labels": data.task.num_labels, "full": args.full}
            given.write_text(json.dumps({**about, **rows}), encoding="utf-8")
            torch = Torch(args.torch, given, args.threads)
        for name, (grouped, kind) in KINDS.items():
            ours = both[grouped]
            ours.train(args.steps // 2), torch.ask(kind, args.steps // 2)
            pairs = [(ours.train(args.steps), float(torch.ask(kind, args.steps))) for _ in range(args.pairs)]
            print(told(f"{task}, {name}", pairs), flush=True)
        if args.rows:
            ours.evaluate(), torch.ask("evaluate")
            print(told(f"{task}, evaluation", [(ours.evaluate(), float(torch.ask("evaluate"))) for _ in range(3)]))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIGABYTE
        print(f"memory at most: jpeft {memory:.2f} GB so far, PyTorch {float(torch.ask('memory')):.2f} GB", flush=True)


if __name__ == "__main__":
    main()
