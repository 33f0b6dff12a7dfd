"""Learning rates of the candidates of FishPAL, one kind in all layers, on MiniLM.

    python -m jpeft.compare --config configs/compare_rates.py --cells docs/results/rates --workdir runs/rates

4,000 training rows, one epoch, one seed.
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

SIZES = {"lora": {"rank": 8}, "pfeiffer": {"bottleneck": 16}, "prefix": {"num_virtual_tokens": 16, "mlp_hidden": None}}
# As many parameters in each layer, 32 d, but for biases. A flat prefix: an MLP would train more than all the rest.


def get_config(task: str = "sst2") -> Config:
    variants = {name: {"method": name, "peft": {name: options}} for name, options in SIZES.items()}
    grid = compare.default(variants, tasks=(task,), seeds=(11,), learning_rates=(2e-3, 8e-3, 3.2e-2, 5e-4))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=1, max_train_examples=4000, max_length=64)
    return grid
