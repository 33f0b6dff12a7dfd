"""LoRA on a base in NF4, FP4 and int8 against float32, MRPC and SST-2, three seeds.

python -m jpeft.compare --config configs/compare_quantised.py --workdir runs/quantised
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

BASES = {"float32": None, "int8": "int8", "nf4": "nf4", "fp4": "fp4"}


def get_config() -> Config:
    variants = {name: {"method": "lora", "quantise": base} for name, base in BASES.items()}
    return compare.default(variants, ("mrpc", "sst2"), reference="float32")
