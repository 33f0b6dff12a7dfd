"""LoRA (rank 8, alpha 16, query and value) on SST-2, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/lora_sst2.py --workdir runs/lora_sst2
    python -m jpeft.main --config configs/lora_sst2.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 91.51 accuracy; roberta-base 95.1.
(UniPELT's tables; roberta-base: microsoft/LoRA. Other recipes than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="sst2", method="lora")
    config.seeds = (111, 11, 22)
    return c.variant(config, variant)
