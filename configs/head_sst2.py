"""The classifier alone on the frozen encoder on SST-2, with the common BERT recipe, since the thesis has none.

    python -m jpeft.main --config configs/head_sst2.py --workdir runs/head_sst2
    python -m jpeft.main --config configs/head_sst2.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 1e-3, 3 epochs, warm-up 10 %, weight decay 0.01, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="sst2", method="head")
    config.train.update(num_epochs=3, warmup_ratio=0.1, weight_decay=0.01)
    config.seeds = (111, 11, 22)
    return c.variant(config, variant)
