"""Intrinsic dimension, structure-aware (SAID), on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/said_mrpc.py --workdir runs/said_mrpc
    python -m jpeft.main --config configs/said_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-3, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="said")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
