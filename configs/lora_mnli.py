"""LoRA (rank 8, alpha 16, query and value) on MNLI, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/lora_mnli.py --workdir runs/lora_mnli
    python -m jpeft.main --config configs/lora_mnli.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 82.51 accuracy (matched); roberta-base 87.5.
(UniPELT's tables; roberta-base: microsoft/LoRA. Other recipes than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mnli", method="lora")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
