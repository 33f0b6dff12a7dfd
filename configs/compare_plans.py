"""How much does the choice of a module by layer matter? 24 plans of equal size on one task, with MiniLM.

    python -m jpeft.compare --config configs/compare_plans.py:sst2 --cells docs/results/plans --workdir runs/plans
    python -m jpeft.workbench.regret --config configs/compare_plans.py:sst2 --cells docs/results/plans

Each kind of module in all layers, in the upper and in the lower half at twice the size, 12 random plans of adapters and
LoRA, and 3 of all three kinds, all within 5 % of equal parameters. The second command then asks every criterion of
FishPAL what it would have chosen. Tasks: sst2, mnli (4,000 rows each), mrpc, cola, stsb, synthetic.
"""

import json

import numpy as np

from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare

LAYERS = 6  # of MiniLM
# As many parameters in each layer, 32 d, but for biases. A flat prefix: an MLP would train more than all the rest.
KINDS = {
    "prefix": {"num_virtual_tokens": 16, "mlp_hidden": None},
    "pfeiffer": {"bottleneck": 16},
    "lora": {"rank": 8},
}
DOUBLE = {
    "prefix": {"num_virtual_tokens": 32, "mlp_hidden": None},
    "pfeiffer": {"bottleneck": 32},
    "lora": {"rank": 16, "alpha": 32},
}
MIXED, RANDOM = 12, 3  # most have no prefix: with prefixes alone a run learns little in so few steps


def plans() -> dict[str, dict[int, list[dict]]]:
    """{name: plan}, as JSON has it."""

    def of(kinds: dict[int, str], sizes: dict) -> dict[int, list[dict]]:
        return {layer: [{"method": kind, "options": sizes[kind]}] for layer, kind in kinds.items()}

    found = {f"all {kind}": of(dict.fromkeys(range(LAYERS), kind), KINDS) for kind in KINDS}
    for half, layers in (("upper", range(LAYERS // 2, LAYERS)), ("lower", range(LAYERS // 2))):
        found |= {f"{half} {kind}": of(dict.fromkeys(layers, kind), DOUBLE) for kind in KINDS}
    rng = np.random.default_rng(0)
    for name, kinds, number in (("mixed", ["pfeiffer", "lora"], MIXED), ("random", list(KINDS), RANDOM)):
        new: list[dict] = []
        while len(new) < number:  # each plan once
            plan = of(dict(enumerate(rng.choice(kinds, LAYERS).tolist())), KINDS)
            new += [plan] if plan not in [*found.values(), *new] else []
        found |= {f"{name} {i}": plan for i, plan in enumerate(new)}
    return found


def get_config(task: str = "sst2") -> Config:
    # Four times the methods' rates, but the own one for prefixes, which learn nothing at four times (docs/methods.md).
    variants = {}
    for name, plan in plans().items():
        kinds = {module["method"] for modules in plan.values() for module in modules}
        rates = {"prefix": METHODS["prefix"].learning_rate} if "prefix" in kinds else {}
        variants[name] = {"method": "fishpal", "fishpal": {"plan": json.dumps(plan), "learning_rates": rates}}
    grid = compare.default(variants, tasks=(task,), seeds=(11, 22))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=1, max_length=64, learning_rate=4 * METHODS["fishpal"].learning_rate)
    if task in ("sst2", "mnli"):
        grid.run.train.max_train_examples = 4000
    return grid
