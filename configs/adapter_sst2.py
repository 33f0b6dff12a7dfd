"""Pfeiffer adapters (reduction factor 16) on SST-2, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/adapter_sst2.py --workdir runs/adapter_sst2
    python -m jpeft.main --config configs/adapter_sst2.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 1e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 91.86 accuracy.
(UniPELT's tables. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="sst2", method="pfeiffer")
    config.train.learning_rate = 1e-4
    config.seeds = (111, 11, 22)
    return c.variant(config, variant)
