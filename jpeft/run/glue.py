"""Any method on any task, without a config file: the config that METHOD,TASK[,demo] names.

python -m jpeft.main --config lora,rte                  # wherever jpeft is installed
python -m jpeft.main --config configs/glue.py:lora,rte  # the same, from the repository
"""

from jpeft.core.errors import UserError
from jpeft.run import checks
from jpeft.run import config as configs
from jpeft.run.config import Config

__all__ = ["get_config"]

BERT = {"num_epochs": 3, "warmup_ratio": 0.1, "weight_decay": 0.01}  # the common recipe of fine-tuning
FISH = {"num_epochs": 7, "weight_decay": 0.0}  # of the FISH mask repository
# Methods that train by another recipe than the FishPAL thesis', which has one for small modules.
RECIPES = {
    "far": BERT, "full": BERT, "head": BERT, "top_k_layers": BERT,
    "fish": FISH, "magnitude_mask": FISH, "random_mask": FISH,
}  # fmt: skip
SEEDS = {"sst2": (111, 11, 22)}  # the thesis' seeds; of the other tasks, 11, 22 and 88


def get_config(name: str = "") -> Config:
    """The config of a method on a task.

    Args:
      name: "METHOD,TASK", or "METHOD,TASK,demo" for the method at a size for two CPU cores, on the built-in data.

    Raises:
      UserError: if there is no such method or task.
    """
    parts = name.split(",")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"config {name!r}: expected METHOD,TASK or METHOD,TASK,demo, such as lora,mrpc")
    method, task, *variant = parts
    config = configs.default(task, method)
    config.train.update(RECIPES.get(method, {}))
    config.seeds = SEEDS.get(task, (11, 22, 88))
    checks.check_names(config)
    return configs.variant(config, *variant) if variant else config
