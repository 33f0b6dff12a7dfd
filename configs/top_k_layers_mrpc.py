"""The last two layers and the pooler, on MRPC, with the common BERT recipe.

    python -m jpeft.main --config configs/top_k_layers_mrpc.py --workdir runs/top_k_layers_mrpc
    python -m jpeft.main --config configs/top_k_layers_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-5, 3 epochs, warm-up 10 %, weight decay 0.01, linear decay.
For RoBERTa add --config.model=roberta-base.

No published figure with this recipe.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="top_k_layers")
    config.train.update(num_epochs=3, warmup_ratio=0.1, weight_decay=0.01)
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
