"""P-tuning with an LSTM encoder, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/p_tuning_mrpc.py --workdir runs/p_tuning_mrpc
    python -m jpeft.main --config configs/p_tuning_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 1e-3, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="p_tuning")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
