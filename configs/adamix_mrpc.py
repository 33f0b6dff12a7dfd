"""AdaMix, four experts an adapter, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/adamix_mrpc.py --workdir runs/adamix_mrpc
    python -m jpeft.main --config configs/adamix_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 92.4 F1.
(The AdaMix repository. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="adamix")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
