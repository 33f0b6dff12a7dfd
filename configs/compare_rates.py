"""Learning rates for every method: its own and multiples of it, on the built-in data with MiniLM, one seed.

    python -m jpeft.compare --config configs/compare_rates.py --cells docs/results/rates --workdir runs/rates

4,000 training rows, one epoch. "lora_x4" is LoRA at four times its own rate, "fish_by8" FISH at an eighth. What does
best here belongs into `configs/compare_all.py`, which trains every method on another task.
"""

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

FACTORS = {
    "fish": (1 / 8, 1, 2, 4),
    **dict.fromkeys(("random_mask", "magnitude_mask"), (1 / 8, 1, 4)),
    "mam": (1, 5, 20),
    "parallel": (1 / 5, 1, 4),
    **dict.fromkeys(("prefix", "prompt"), (1, 4, 16)),
    "p_tuning": (1 / 5, 1, 4, 16),
}


def get_config() -> Config:
    factors = {name: FACTORS.get(name, (1, 4)) for name in METHODS if name != "fishpal"}  # which finds its own
    variants, curves = {}, {}
    for method, own in factors.items():
        named = {f"{method}_x{x:g}" if x >= 1 else f"{method}_by{1 / x:g}": x for x in own}
        for name, factor in named.items():
            rate = factor * METHODS[method].learning_rate
            variants[name] = {"method": method, "train": {"learning_rate": rate}}
        curves[method] = named
    for name in ("mam_x1", "mam_x5"):  # with a prefix that is not twice as long as the texts
        variants[name.replace("mam", "mam_10_tokens")] = {**variants[name], "peft": {"mam": {"num_virtual_tokens": 10}}}
    axis = "learning rate over the method's own"
    grid = compare.default(variants, tasks=("synthetic",), seeds=(11,), curves=curves, axis=axis)
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=1, max_length=128, max_train_examples=4000)
    return grid
