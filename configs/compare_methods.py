"""The methods that most people choose among, on four tasks of GLUE with three seeds, each at its own learning rate.

    python -m jpeft.compare --config configs/compare_methods.py --workdir runs/compare_methods
    python -m jpeft.compare --config configs/compare_methods.py --config.run.model=minilm --config.tasks="('mrpc',)"

For other methods or settings, copy this file: a variant is any set of fields of a run's config.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

METHODS = ("full", "head", "bitfit", "ia3", "lora", "dora", "pfeiffer", "houlsby", "prefix", "fishpal")


def get_config() -> Config:
    return compare.default(METHODS, tasks=("mrpc", "cola", "stsb", "sst2"), seeds=(11, 22, 88))
