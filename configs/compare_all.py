"""Every method on SST-2 with MiniLM, three seeds, each at the rate that `FACTORS` gives it: docs/methods.md.

    python -m jpeft.compare --config configs/compare_all.py --cells docs/results/methods --workdir runs/methods

4,000 training rows, two epochs.
"""

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

# Multiples of the methods' own rates: 1 where four times leaves a method at the majority answer in `compare_rates.py`,
# four for all others. AdapterDrop and SAID scored 1.6 and 4.2 less at four there, FISH 2.8 more at two.
FACTORS: dict[str, int] = {"prefix": 1, "prompt": 1, "p_tuning": 1, "mam": 1, "parallel": 1, "fish": 1}


def get_config() -> Config:
    variants = {
        name: {"method": name, "train": {"learning_rate": FACTORS.get(name, 4) * METHODS[name].learning_rate}}
        for name in METHODS
        if name != "fishpal"
    }
    grid = compare.default({**variants, "fishpal": {"method": "fishpal"}}, tasks=("sst2",), seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=2, max_length=128, max_train_examples=4000)
    return grid
