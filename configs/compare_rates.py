"""Learning rates for every method: its own and multiples of it, on the built-in data with MiniLM, one seed.

    python -m jpeft.compare --config configs/compare_rates.py --cells docs/results/rates --workdir runs/rates

4,000 training rows, one epoch. "lora_x4" is LoRA at four times its own rate. What does best
here belongs into `configs/compare_all.py`, which trains every method on another task.
"""

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

# Masks train half a percent of the entries, by default at a rate that was meant for all of them.
FACTORS = {
    "fish": (4, 32, 128),
    "random_mask": (4, 32, 128),
    "magnitude_mask": (4, 32, 128),
    "prefix": (1, 4, 16),
    "p_tuning": (1, 4, 16),
    "prompt": (1, 4, 16),
}


def get_config() -> Config:
    factors = {name: FACTORS.get(name, (1, 4)) for name in METHODS if name != "fishpal"}  # which finds its own
    variants = {
        f"{name}_x{factor}": {"method": name, "train": {"learning_rate": factor * METHODS[name].learning_rate}}
        for name, own in factors.items()
        for factor in own
    }
    curves = {name: {f"{name}_x{factor}": factor for factor in own} for name, own in factors.items()}
    axis = "learning rate over the method's own"
    grid = compare.default(variants, tasks=("synthetic",), seeds=(11,), curves=curves, axis=axis)
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=1, max_length=128, max_train_examples=4000)
    return grid
