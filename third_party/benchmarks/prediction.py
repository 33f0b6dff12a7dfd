"""Times `jpeft.predict` against `pipeline` of transformers with the merged model, on the same rows of MNLI, in turn.

    python -m jpeft.export --model runs/mnli --format hf --output merged
    JPEFT_GLUE_DIR=GLUE_FOLDER python third_party/benchmarks/prediction.py --model runs/mnli/seed_11/model \
        --merged merged --torch .venv-parity-transformers/bin/python

Text to probabilities, tokenising included, in float32 and in batches of 32, with as many threads on both sides. The
pipeline gets the rows in their order, as its users give them, and, in further pairs, sorted by length, which is what
`jpeft.predict` does by itself. Each figure is the median of the pairs. The first pass of either side is told apart,
since jpeft compiles in it; both must give the same probabilities. On a machine that others use,
the time of the processors says more than that of the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jpeft
from jpeft.data import tasks

ORDERS = {"order": "rows in their order", "sorted": "rows sorted by length"}
TOLERANCE = 1e-4  # of a probability


def rows(count: int | None) -> list[tuple[str, str]]:
    """The first rows of MNLI's matched validation split, which come in no order of length; None for all of them."""
    split = tasks.load("mnli", os.environ["JPEFT_GLUE_DIR"]).splits["validation_matched"]
    pairs = zip(split["premise"], split["hypothesis"], strict=True)
    return [(str(one), str(two)) for one, two in pairs][:count]


class Torch:
    """The other side, in a process of its own."""

    def __init__(self, python: str, *args: str | Path):
        script = Path(__file__).with_name("torch_prediction.py")
        environ = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {
            "TOKENIZERS_PARALLELISM": "true"
        }
        self._process = subprocess.Popen(
            [python, script, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit("PyTorch's side did not start")

    def seconds(self, *what: str | Path) -> tuple[float, ...]:
        """The time of one pass, and that of the processors."""
        self._process.stdin.write(" ".join(map(str, what)) + "\n")
        self._process.stdin.flush()
        return tuple(map(float, self._process.stdout.readline().split()))


def timed(saved: jpeft.Saved, texts: Sequence[tuple[str, str]]) -> tuple[tuple[float, float], np.ndarray]:
    start = time.perf_counter(), time.process_time()
    logits = jpeft.predict(saved, texts)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds, shares / shares.sum(1, keepdims=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="seed_<n>/model of a run on MNLI")
    parser.add_argument("--merged", required=True, help="what jpeft.export --format hf made of it")
    parser.add_argument("--torch", required=True, help="a Python with requirements-transformers.txt")
    parser.add_argument("--rows", type=int, default=2000, help="of a pass; 0 for all")
    parser.add_argument("--pairs", type=int, default=3, help="timed passes of each side, for each order")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch; JAX takes all")
    args = parser.parse_args()
    saved, texts = jpeft.load(args.model), rows(args.rows or None)
    with tempfile.TemporaryDirectory() as folder:
        data, answers = Path(folder) / "rows.json", Path(folder) / "answers.npy"
        data.write_text(json.dumps(texts), encoding="utf-8")
        torch = Torch(args.torch, args.merged, data, str(saved.max_length), "32", str(args.threads))
        first_theirs = torch.seconds("order", answers)
        first_ours, shares = timed(saved, texts)
        difference = float(np.abs(shares - np.load(answers)).max())
        print(f"{len(texts):,} rows; first pass: jpeft {first_ours[0]:.1f} s with compiling, "
              f"pipeline {first_theirs[0]:.1f} s")  # fmt: skip
        print(f"largest difference of a probability {difference:.1e}")
        for order, name in ORDERS.items():
            times = [(timed(saved, texts)[0], torch.seconds(order)) for _ in range(args.pairs)]
            for i, clock in enumerate(("a second", "a second of a processor")):
                ours, theirs = (len(texts) / statistics.median(x[i] for x in side) for side in zip(*times, strict=True))
                ratios = sorted(theirs[i] / ours[i] for ours, theirs in times)
                print(f"{name}: jpeft {ours:.1f} and pipeline {theirs:.1f} examples {clock}; jpeft "
                      f"{statistics.median(ratios):.2f} times as fast, {ratios[0]:.2f} to {ratios[-1]:.2f}",
                      flush=True)  # fmt: skip
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
