"""The table of UniPELT (Mao et al. 2022, arXiv:2110.07577): GLUE with BERT-base, and what the paper found beside it.

    python -m jpeft.compare --config configs/compare_unipelt.py --workdir runs/unipelt

Published on MRPC (F1): full 90.94, adapter 89.86, prefix 91.29, LoRA 90.03, UniPELT 90.28 (adapter and prefix) and
90.94 (with LoRA); the other tasks are in third_party/results/unipelt.csv. The recipe is that of the FishPAL thesis,
which builds on UniPELT's code (`full`: the common recipe of BERT), and the rates are the methods' own. On two CPU
cores, take one small task and MiniLM:
--config.run.model=minilm --config.tasks="('mrpc',)".
"""

from pathlib import Path
from typing import Any

from jpeft.run.config import Config
from jpeft.workbench import compare

PUBLISHED = Path(__file__).parents[1] / "third_party" / "results" / "unipelt.csv"
TASKS = ("sst2", "mrpc", "cola", "rte", "qnli", "stsb", "mnli", "qqp")


def get_config() -> Config:
    variants: dict[str, dict[str, Any]] = {
        name: {"method": name} for name in ("full", "pfeiffer", "prefix", "lora", "unipelt")
    }
    variants["unipelt_ap"] = {"method": "unipelt", "peft": {"unipelt": {"variant": "ap"}}}
    variants["full"]["train"] = {
        "num_epochs": 3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
    }  # the common recipe of BERT
    return compare.default(variants, TASKS, published=str(PUBLISHED))
