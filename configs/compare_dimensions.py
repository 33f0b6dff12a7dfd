"""Intrinsic dimension: the smallest SAID dimension that reaches 90 % of full fine-tuning, on MRPC.

    python -m jpeft.compare --config configs/compare_dimensions.py --workdir runs/dimensions

The study of Aghajanyan et al. 2020 (arXiv:2012.13255), who move all parameters of the model. Here the targets are
LoRA's, which CPUs can do.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

DIMENSIONS = (10, 32, 100, 316, 1000, 3162, 10_000)


def get_config(task: str = "mrpc") -> Config:
    places = {f"said {d}": d for d in DIMENSIONS}
    variants = {name: {"method": "said", "peft": {"said": {"intrinsic_dim": d}}} for name, d in places.items()}
    return compare.default(
        {"full": {"method": "full"}, **variants},
        (task,),
        curves={"SAID": places},
        axis="intrinsic dimension",
        reference="full",
    )
