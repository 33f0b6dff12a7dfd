"""Full fine-tuning on MRPC, with the common BERT recipe, since the thesis has none.

    python -m jpeft.main --config configs/full_mrpc.py --workdir runs/full_mrpc
    python -m jpeft.main --config configs/full_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 2e-5, 3 epochs, warm-up 10 %, weight decay 0.01, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 90.94 F1; roberta-base 90.2 accuracy.
(UniPELT's tables; roberta-base: microsoft/LoRA. Other recipes than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="full")
    config.train.update(num_epochs=3, warmup_ratio=0.1, weight_decay=0.01)
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
