"""A grid of one's own: python -m jpeft.compare --config examples/own_grid.py"""

from jpeft.run.config import Config
from jpeft.workbench import compare


def get_config() -> Config:
    """Three sizes of LoRA and BitFit, on two tasks, with three seeds."""
    variants = {f"LoRA {rank}": {"method": "lora", "peft": {"lora": {"rank": rank}}} for rank in (2, 8, 32)}
    grid = compare.default(variants | {"BitFit": {"method": "bitfit"}}, tasks=("mrpc", "cola"), seeds=(11, 22, 88))
    grid.run.update(model="minilm")  # what all runs share
    grid.run.train.update(num_epochs=3, max_train_examples=4000)
    return grid
