"""The experiment of the FISH mask (Sung et al. 2021, arXiv:2111.09839): a few entries of BERT-large, on GLUE.

    python -m jpeft.compare --config configs/compare_fish.py --workdir runs/fish

bert-large-cased-whole-word-masking, 7 epochs, batch 16, learning rate 5e-5, masks of 0.08, 0.5, 2 and 10 percent from
1,024 examples, beside a random mask, all biases (at 1e-3), and all parameters. The paper also searches rates of 1e-4
and 1e-5 and batches of 8, and scores on GLUE's test server; its table is not among third_party/results. On two CPU
cores:
--config.run.model=minilm --config.tasks="('mrpc',)".
"""

from typing import Any

from jpeft.run.config import Config
from jpeft.workbench import compare

TASKS = ("qqp", "mnli", "rte", "cola", "stsb", "sst2", "mrpc", "qnli")  # in the order of the repository


def get_config() -> Config:
    variants: dict[str, dict[str, Any]] = {"full": {"method": "full"}, "bitfit": {"method": "bitfit"}}
    for ratio in (0.0008, 0.005, 0.02, 0.1):
        variants[f"FISH {1e4 * ratio:g} per 10,000"] = {"method": "fish", "peft": {"fish": {"ratio": ratio}}}
    variants["random 50 per 10,000"] = {"method": "random_mask", "peft": {"random_mask": {"ratio": 0.005}}}
    for name in variants.keys() - {"bitfit"}:
        variants[name]["train"] = {"learning_rate": 5e-5}
    grid = compare.default(variants, TASKS, seeds=(0,), reference="full")
    grid.run.model = "bert-large-cased-whole-word-masking"
    grid.run.train.update(num_epochs=7, weight_decay=0.0)
    return grid
