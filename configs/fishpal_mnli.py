"""FishPAL on MNLI, with the recipe of the FishPAL thesis.

    python -m jpeft.main --config configs/fishpal_mnli.py --workdir runs/fishpal_mnli
    python -m jpeft.main --config configs/fishpal_mnli.py:demo          # two CPU cores, no network

AdamW, batch 16, 10 epochs, warm-up 6 %, weight decay 0.1, linear decay; learning rate 5e-4 (prefix 2e-4).
For RoBERTa add --config.model=roberta-base.

The choice is by the default criterion, a race (docs/choice.md), and each kind of module trains at its own rate. The
rule of the thesis, and one rate for all, is `--config.fishpal.criterion=thesis`; its plan for this task is
`--config.fishpal.plan=thesis_mnli` (twelve layers). The thesis claims more than each of its modules alone; it prints no
table of scores.
"""

from jpeft.run import config as c


def get_config(variant: str = "") -> c.Config:
    config = c.default(task="mnli", method="fishpal")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
