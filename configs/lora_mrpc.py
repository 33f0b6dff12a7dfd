"""LoRA (rank 8, alpha 16, query and value) on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/lora_mrpc.py --workdir runs/lora_mrpc
    python -m jpeft.main --config configs/lora_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 90.03 F1; roberta-base 89.7 accuracy (started from its MNLI run).
(UniPELT's tables; roberta-base: microsoft/LoRA. Other recipes than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="lora")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
