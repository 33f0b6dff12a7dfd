"""Prefix tuning (10 virtual tokens, MLP of 512) on MNLI, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/prefix_mnli.py --workdir runs/prefix_mnli
    python -m jpeft.main --config configs/prefix_mnli.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 2e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 81.15 accuracy (matched).
(UniPELT's tables. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mnli", method="prefix")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
