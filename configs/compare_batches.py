"""Batches of rows of similar length against random ones: LoRA on MiniLM, three tasks, three seeds.

    python -m jpeft.compare --config configs/compare_batches.py --cells docs/results/batches --workdir runs/batches

At most 4,000 training rows, three epochs, four times LoRA's own learning rate.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare


def get_config(task: str = "") -> Config:
    variants = {
        name: {"method": "lora", "train": {"group_by_length": name == "grouped"}} for name in ("random", "grouped")
    }
    grid = compare.default(variants, tasks=(task,) if task else ("synthetic", "cola", "mrpc"), seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=3, max_length=128, max_train_examples=4000, learning_rate=2e-3)
    return grid
