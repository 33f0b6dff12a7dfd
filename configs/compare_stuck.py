"""Methods that answered like the majority in docs/methods.md, at other learning rates: MRPC, MiniLM, two epochs.

    python -m jpeft.compare --config configs/compare_stuck.py --cells docs/results/stuck --workdir runs/stuck

There every method had four times its own rate. Here "mask_x32" is `mask` at 32 times its own.
"""

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

FACTORS = {
    "parallel": (1,),
    "mam": (1,),
    "random_mask": (32, 128),
    "magnitude_mask": (32, 128),
    "fish": (32,),
    "p_tuning": (1,),
    "prefix": (16, 64),
}


def get_config() -> Config:
    variants = {
        f"{name}_x{factor}": {"method": name, "train": {"learning_rate": factor * METHODS[name].learning_rate}}
        for name, factors in FACTORS.items()
        for factor in factors
    }
    grid = compare.default(variants, tasks=("mrpc",), seeds=(11,))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=2, max_length=128)
    return grid
