"""Kills runs at random moments until they are done, and holds what they leave against runs that nobody touched.

    python third_party/benchmarks/kills.py --folder /tmp/kills

MiniLM on 480 rows of the built-in data: LoRA, FISH, and three seeds of an adapter that train together. Every run is
killed (SIGKILL, as when a machine is taken away) a random time after it starts, and started again by the same command,
25 times over all runs. Whether the end is the same is asked bit by bit, of modules, predictions and metrics.
"""

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

COMMON = (
    "--config.model=minilm", "--config.train.max_train_examples=480", "--config.train.num_epochs=4",
    "--config.train.max_length=48",
)  # fmt: skip
RUNS = {
    "lora": ("--config=lora,synthetic", "--config.seeds=(1,)", "--config.peft.lora.dropout=0.1"),
    "fish": ("--config=fish,synthetic", "--config.seeds=(1,)", "--config.peft.fish.num_examples=64"),
    "pfeiffer": ("--config=pfeiffer,synthetic", "--config.seeds=(1, 2, 3)", "--config.train.together=3"),
}
KILLS = 25
SAME = ("seed_*/model/modules.safetensors", "seed_*/predictions.safetensors", "metrics.jsonl")


def start(name: str, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jpeft.main", *RUNS[name], *COMMON, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}, no run can be unreadable:\n{printed}")


def killed(name: str, workdir: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """Kills a run up to `kills` times and lets it finish; how often it was alive to be killed."""
    done = 0
    for _ in range(kills):
        process = start(name, workdir)
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
        if process.poll() is not None:  # it was done before
            finish(process)
            continue
        process.kill()
        process.communicate()
        done += 1
    finish(start(name, workdir))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for workdirs; must not be there yet")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    rng, total = random.Random(given.seed), 0
    for i, name in enumerate(RUNS):
        whole, other = given.folder / f"{name}_whole", given.folder / f"{name}_killed"
        finish(start(name, whole))
        began = time.monotonic()
        finish(start(name, given.folder / f"{name}_again"))  # with all programs compiled, as after a kill
        seconds = time.monotonic() - began
        done = killed(name, other, KILLS // len(RUNS) + (i < KILLS % len(RUNS)), seconds, rng)
        total += done
        files = sorted(path.relative_to(whole) for pattern in SAME for path in whole.glob(pattern))
        differ = [str(path) for path in files if (whole / path).read_bytes() != (other / path).read_bytes()]
        print(f"{name}: {seconds:.0f} s undisturbed, {done} kills; {len(files)} files, that differ: {differ or 'none'}")
    print(f"{total} kills")


if __name__ == "__main__":
    main()
