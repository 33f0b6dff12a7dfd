"""BitFit, all biases, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/bitfit_mrpc.py --workdir runs/bitfit_mrpc
    python -m jpeft.main --config configs/bitfit_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 1e-3, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 90.4 F1.
(BitFit's figure as the AdaMix repository gives it. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="bitfit")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
