"""What do stratified batches cost? LoRA, with every row padded to one length, and to up to four.

    python -m jpeft.compare --config configs/compare_batches.py --cells docs/results/batches --workdir runs/batches

With one length batches are random; with several, each has the same share of rows of every length. MiniLM, three epochs;
on the built-in data the recipe of the demo.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare


def get_config() -> Config:
    variants = {
        "one_length": {"method": "lora", "train": {"padded_lengths": 1}},
        "four_lengths": {"method": "lora"},
    }
    grid = compare.default(variants, tasks=("mrpc", "cola", "synthetic"), seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=3, max_length=64)
    grid.by_task = {"synthetic": {"train": {"num_epochs": 4, "learning_rate": 2e-3}}}
    return grid
