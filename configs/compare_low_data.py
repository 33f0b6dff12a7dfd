"""Few examples: 100, 500 and 1,000 rows of SST-2 and MNLI, full fine-tuning against six methods, three seeds.

    python -m jpeft.compare --config configs/compare_low_data.py --workdir runs/low_data

Twenty epochs, since there are few steps in one.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

METHODS = ("full", "head", "bitfit", "ia3", "lora", "pfeiffer", "prefix")
SIZES = (100, 500, 1000)


def get_config() -> Config:
    variants = {
        f"{method} {rows}": {"method": method, "train": {"max_train_examples": rows}}
        for method in METHODS
        for rows in SIZES
    }
    curves = {method: {f"{method} {rows}": rows for rows in SIZES} for method in METHODS}
    grid = compare.default(variants, ("sst2", "mnli"), curves=curves, axis="training examples")
    grid.run.train.num_epochs = 20
    return grid
