"""Score against trained parameters: adapters, LoRA, the top layers and FISH in several sizes, five seeds, MNLI.

    python -m jpeft.compare --config configs/compare_sizes.py --workdir runs/sizes

The study of Houlsby et al. 2019 (arXiv:1902.00751, figure 3), with the sizes of rplacucci/PEFT and what was found there
in a column: Houlsby adapters of 64 83.4, LoRA of rank 64 83.1, the six top layers 83.5; third_party/results/sizes.csv
has all. On two CPU cores, take MiniLM and fewer rows:
--config.run.model=minilm --config.run.train.max_train_examples=4000.
"""

from pathlib import Path
from typing import Any

from jpeft.run.config import Config
from jpeft.workbench import compare

PUBLISHED = Path(__file__).parents[1] / "third_party" / "results" / "sizes.csv"
SIZES = {
    "houlsby": ("houlsby", "bottleneck", (1, 4, 16, 64, 256)),  # with LayerNorms, as in that repository
    "LoRA": ("lora", "rank", (1, 4, 16, 64)),
    "top layers": ("top_k_layers", "num_layers", (1, 2, 3, 6)),
    "FISH": ("fish", "count", (10_000, 100_000, 1_000_000)),
}


def get_config(task: str = "mnli") -> Config:
    variants, curves = {"full": {"method": "full"}}, {}
    for curve, (method, option, sizes) in SIZES.items():
        named: dict[str, Any] = {
            f"{curve} {size}": {"method": method, "peft": {method: {option: size}}} for size in sizes
        }
        for size, fields in zip(sizes, named.values(), strict=True):
            if method == "lora":  # one scale for all ranks, as there
                fields["peft"]["lora"]["alpha"] = float(size)
            if method == "houlsby":
                fields["method"] = "houlsby+layer_norm"
        variants |= named
        curves[curve] = dict.fromkeys(named)
    return compare.default(
        variants, (task,), seeds=(1, 2, 3, 4, 5), curves=curves, reference="full", published=str(PUBLISHED)
    )
