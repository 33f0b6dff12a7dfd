"""Prefix tuning (10 virtual tokens, MLP of 512) on SST-2, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/prefix_sst2.py --workdir runs/prefix_sst2
    python -m jpeft.main --config configs/prefix_sst2.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 2e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 90.94 accuracy.
(UniPELT's tables. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="sst2", method="prefix")
    config.seeds = (111, 11, 22)
    return c.variant(config, variant)
