"""FISH mask, 0.5 % of the parameters, on MRPC, for seven epochs as varunnair18/FISH trains.

    python -m jpeft.main --config configs/fish_mrpc.py --workdir runs/fish_mrpc
    python -m jpeft.main --config configs/fish_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-5, 7 epochs, warm-up 6 %, no weight decay, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="fish")
    config.train.update(num_epochs=7, weight_decay=0.0)
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
