"""Does it matter that rows of similar length share a batch? LoRA, with batches grouped by length and random ones.

    python -m jpeft.compare --config configs/compare_batches.py --cells docs/results/batches --workdir runs/batches

MiniLM, three epochs; on the built-in data the recipe of the demo.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare


def get_config() -> Config:
    variants = {
        "grouped": {"method": "lora"},
        "random": {"method": "lora", "train": {"group_by_length": False}},
    }
    grid = compare.default(variants, tasks=("synthetic", "mrpc", "cola"), seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=3, max_length=64)
    grid.by_task = {"synthetic": {"train": {"num_epochs": 4, "learning_rate": 2e-3}}}
    return grid
