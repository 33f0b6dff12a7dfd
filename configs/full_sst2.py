"""Full fine-tuning on SST-2, with the common BERT recipe, since the thesis has none.

    python -m jpeft.main --config configs/full_sst2.py --workdir runs/full_sst2
    python -m jpeft.main --config configs/full_sst2.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 2e-5, 3 epochs, warm-up 10 %, weight decay 0.01, linear decay.
For RoBERTa add --config.model=roberta-base.

bert-base-uncased, published: 91.63 accuracy; roberta-base 94.8.
(UniPELT's tables; roberta-base: microsoft/LoRA. Other recipes than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="sst2", method="full")
    config.train.update(num_epochs=3, warmup_ratio=0.1, weight_decay=0.01)
    config.seeds = (111, 11, 22)
    return c.variant(config, variant)
