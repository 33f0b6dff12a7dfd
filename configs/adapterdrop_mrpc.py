"""AdapterDrop, Pfeiffer adapters trained to do without the lower ones, on MRPC, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/adapterdrop_mrpc.py --workdir runs/adapterdrop_mrpc
    python -m jpeft.main --config configs/adapterdrop_mrpc.py:demo          # two CPU cores, no network

AdamW, batch 16, learning rate 5e-4, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay.
For RoBERTa add --config.model=roberta-base.

roberta-base, published: 88.5 accuracy with 0.3 M parameters, 88.4 with 0.9 M.
(microsoft/LoRA's table. Another recipe than this one.)
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mrpc", method="adapterdrop")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
