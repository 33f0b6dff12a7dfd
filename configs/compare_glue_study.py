"""The GLUE study of rplacucci/PEFT: full fine-tuning, Houlsby adapters and LoRA on nine tasks, each over its grid.

    python -m jpeft.compare --config configs/compare_glue_study.py:mrpc --workdir runs/glue_study_mrpc

BERT-base, seed 42, warm-up 10 %, weight decay 0.01. Full: batches of 16 and 32, rates 1e-5 to 5e-5, 2 to 4 epochs.
Adapters: bottlenecks of 64 and 256, rates 1e-4 and 1e-3, 3 and 20 epochs, with LayerNorms. LoRA: ranks 4 and 16, alpha
the same, rates 1e-4 and 5e-4, 3 and 20 epochs. Tasks: all of them, or one.

Published, of the best of each grid, on GLUE's test server: MRPC (F1) 88.0, 89.7 and 88.5; the other tasks are in
third_party/results/glue_study.csv. A variant here is scored on the validation split; its test answers for the server
are `python -m jpeft.submit`'s. The study's other experiment, score against size, is configs/compare_sizes.py.
"""

import itertools
from pathlib import Path
from typing import Any

from jpeft.run.config import Config
from jpeft.workbench import compare

PUBLISHED = Path(__file__).parents[1] / "third_party" / "results" / "glue_study.csv"
TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def get_config(task: str = "") -> Config:
    variants: dict[str, dict[str, Any]] = {}
    for batch, rate, epochs in itertools.product((16, 32), (1e-5, 2e-5, 3e-5, 5e-5), (2, 3, 4)):
        train = {"batch_size": batch, "learning_rate": rate, "num_epochs": epochs}
        variants[f"full {batch} {rate:.0e} {epochs}"] = {"method": "full", "train": train}
    for size, rate, epochs in itertools.product((64, 256), (1e-4, 1e-3), (3, 20)):
        train = {"batch_size": 32, "learning_rate": rate, "num_epochs": epochs}
        adapters = {"method": "houlsby+layer_norm", "peft": {"houlsby": {"bottleneck": size}}, "train": train}
        variants[f"houlsby {size} {rate:.0e} {epochs}"] = adapters
    for rank, rate, epochs in itertools.product((4, 16), (1e-4, 5e-4), (3, 20)):
        train = {"batch_size": 32, "learning_rate": rate, "num_epochs": epochs}
        lora = {"method": "lora", "peft": {"lora": {"rank": rank, "alpha": rank}}, "train": train}
        variants[f"lora {rank} {rate:.0e} {epochs}"] = lora
    grid = compare.default(variants, (task,) if task else TASKS, seeds=(42,), published=str(PUBLISHED))
    grid.run.train.update(warmup_ratio=0.1, weight_decay=0.01)
    return grid
