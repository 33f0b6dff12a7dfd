"""Ladder-side tuning, a network beside the encoder, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/ladder_side_mrpc.py --workdir runs/ladder_side_mrpc
    python -m jpeft.main --config configs/ladder_side_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 3e-3, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="ladder_side")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
