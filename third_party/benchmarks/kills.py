"""Kills runs at random moments until they are done, and holds what they leave against runs that nobody touched.

    python third_party/benchmarks/kills.py --folder /tmp/kills

MiniLM on 240 rows of the built-in data: LoRA, FISH, and three seeds of an adapter that train together. Every run is
killed (SIGKILL, as when a machine is taken away) a random time after it starts, and started again by the same command,
until it is done; then anew, as often as it takes. Whether the end is the same is asked bit by bit, of modules,
predictions and metrics.
"""

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMON = (
    "--config.model=minilm", "--config.train.max_train_examples=240", "--config.train.num_epochs=4",
    "--config.train.max_length=48",
)  # fmt: skip
RUNS = {
    "lora": ("--config=lora,synthetic", "--config.seeds=(1,)", "--config.peft.lora.dropout=0.1"),
    "fish": ("--config=fish,synthetic", "--config.seeds=(1,)", "--config.peft.fish.num_examples=64"),
    "pfeiffer": ("--config=pfeiffer,synthetic", "--config.seeds=(1, 2, 3)", "--config.train.together=3"),
}
SAME = ("seed_*/model/modules.safetensors", "seed_*/predictions.safetensors", "metrics.jsonl")


def start(name: str, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jpeft.main", *RUNS[name], *COMMON, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}, no run can be unreadable:\n{printed}")


def killed(name: str, folder: Path, kills: int, seconds: float, rng: random.Random) -> Iterator[Path]:
    """The workdirs of runs that were killed until they were done, as many as it takes to kill `kills` times."""
    done = rounds = 0
    while done < kills:
        rounds += 1
        workdir, finished = folder / f"{name}_killed_{rounds}", False
        while not finished:
            process = start(name, workdir)
            try:
                printed, _ = process.communicate(timeout=rng.uniform(0.3, 0.9) * seconds if done < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                continue
            finished = True
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode} after a kill:\n{printed}")
        yield workdir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for workdirs; must not be there yet")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kills", type=int, default=25, help="over all runs")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    rng = random.Random(given.seed)
    for i, name in enumerate(RUNS):
        whole = given.folder / f"{name}_whole"
        finish(start(name, whole))
        began = time.monotonic()
        finish(start(name, given.folder / f"{name}_again"))  # with all programs compiled, as after a kill
        seconds = time.monotonic() - began
        kills = given.kills // len(RUNS) + (i < given.kills % len(RUNS))
        files = sorted(path.relative_to(whole) for pattern in SAME for path in whole.glob(pattern))
        for other in killed(name, given.folder, kills, seconds, rng):
            differ = [str(path) for path in files if (whole / path).read_bytes() != (other / path).read_bytes()]
            print(f"{other.name}: {len(files)} files, that differ: {differ or 'none'}")
        print(f"{name}: {seconds:.0f} s undisturbed, {kills} kills")


if __name__ == "__main__":
    main()
