"""Pfeiffer adapters (reduction factor 16) on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/adapter_mrpc.py --workdir runs/adapter_mrpc
    python -m jpeft.main --config configs/adapter_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 1e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 89.86 F1.
(UniPELT's tables. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="pfeiffer")
    config.train.learning_rate = 1e-4
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
