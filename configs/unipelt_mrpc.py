"""UniPELT, gated prefix, adapter and LoRA, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/unipelt_mrpc.py --workdir runs/unipelt_mrpc
    python -m jpeft.main --config configs/unipelt_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 90.94 F1 (APL), 90.28 (AP).
(UniPELT's tables. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="unipelt")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
