"""FishPAL as it comes, beside each of its candidates in all layers, on six tasks with MiniLM.

"lora_x4" and "pfeiffer_x4" train at four times the methods' own rates.

    python -m jpeft.compare --config configs/compare_candidates.py --cells docs/results/candidates --workdir runs/study

The cells in docs/results/candidates are of an earlier version: the command reports on them, says so, and adds none. For
new ones take another folder. At most 4,000 training rows, three epochs. Tasks: all of them, or one
(compare_candidates.py:mrpc).
"""

from typing import Any

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

VARIANTS = ("lora", "pfeiffer", "prefix", "fishpal", "lora_x4", "pfeiffer_x4")
TASKS = ("mrpc", "stsb", "cola", "sst2", "mnli", "synthetic")


def get_config(task: str = "") -> Config:
    variants = {name: _fields(*name.split("_x")) for name in VARIANTS}
    grid = compare.default(variants, tasks=(task,) if task else TASKS, seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=3, max_length=128, max_train_examples=4000)
    return grid


def _fields(method: str, factor: str = "1") -> dict[str, Any]:
    rate = {} if factor == "1" else {"train": {"learning_rate": int(factor) * METHODS[method].learning_rate}}
    return {"method": method, **rate}
