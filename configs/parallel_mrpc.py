"""Parallel adapters, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/parallel_mrpc.py --workdir runs/parallel_mrpc
    python -m jpeft.main --config configs/parallel_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="parallel")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
