"""The config of a search for plans that are good for their size: a space, a short recipe and a full one.

A search is that of AutoPEFT (Zhou et al. 2023, arXiv:2301.12132). A trial is a run of a plan by the short recipe
(`trials.py`); what comes out on the front of score and size is trained by the full one (`best.py`).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jpeft.core.errors import UserError, nearest
from jpeft.core.tree import flatten, unflatten
from jpeft.plans import plan as plans
from jpeft.plans.plan import Plan
from jpeft.run import checks
from jpeft.run import config as configs
from jpeft.run.config import Config
from jpeft.workbench import compare
from jpeft.workbench import space as spaces
from jpeft.workbench.sampling import needs_optuna

__all__ = ["check", "config_of", "default", "fields", "recipe"]


def default(task: str, space: Mapping[str, Mapping[str, Any]] | None = None, trials: int = 30, seed: int = 0) -> Config:
    """The config of a search.

    Args:
      task: on which.
      space: {name: candidate}; a candidate is {"method": name, "option": that says its size, "sizes": in rising order,
        0 for none, "options": others}. A layer has them in the order of their names. None for AutoPEFT's.
      trials: how many plans are trained by the short recipe.
      seed: of what is drawn.

    Returns:
      A config with these fields, and with others:

    - `run`: a run's config, the full recipe.
    - `search`: fields of a run's config that make the short recipe of it; None is what the full one has.
    - `layers`: "bits", one for each layer, or "all".
    - `startup`: how many trials are drawn at random.
    - `warm_start`: whether each candidate in all layers, at its middle size, comes first.
    """
    full = configs.default("mrpc", "head")
    del full["task"], full["method"]
    candidates = spaces.autopeft() if space is None else space
    return ConfigDict(
        {
            "run": full,
            "task": task,
            "space": {name: dict(candidate) for name, candidate in candidates.items()},
            "layers": "bits",
            "trials": trials,
            "startup": 10,
            "seed": seed,
            "warm_start": True,
            "search": {
                "seeds": (1,),
                "train": {
                    "num_epochs": 1,
                    "max_train_examples": placeholder(int),
                    "learning_rate": placeholder(float),
                },
            },
        }
    )


def config_of(config: Config, plan: Plan, short: bool) -> Config:
    """The config of a plan's run, by the short recipe or the full one.

    Raises:
      UserError: if a field is set that a run does not have.
    """
    own = configs.default(config.task, "fishpal")
    compare.set_fields(own, config.run.to_dict(), "run")
    if short:
        given = {name: value for name, value in flatten(config.search.to_dict()).items() if value is not None}
        compare.set_fields(own, unflatten(given), "search")
    own.task, own.method = config.task, "fishpal"
    compare.set_fields(own, {"fishpal": fields(own, plan)}, "space")
    return own


def fields(run: Config, plan: Plan) -> dict[str, Any]:
    """What `config.fishpal` has for a plan, without the learning rates that are given for other plans of the space."""
    kinds = {entry.method for entries in plan.values() for entry in entries}
    rates = {name: rate if name in kinds else None for name, rate in run.fishpal.learning_rates.items()}
    return {"plan": plans.dumps(plan), "learning_rates": rates}


def check(config: Config) -> None:
    """Checks all that can be checked without data, weights or a plan.

    Raises:
      UserError: for the first field that cannot be, or if Optuna is not there.
    """
    for name, least in (("trials", 1), ("startup", 1), ("seed", 0)):
        if type(config[name]) is not int or not least <= config[name] < 2**32:
            raise UserError(f"config.{name} must be a whole number of at least {least}, got {config[name]!r:.60}")
    for name in ("run", "search"):
        if not isinstance(config[name], ConfigDict):
            raise UserError(f"config.{name} must be a dict of fields of a run, got {config[name]!r:.60}")
        for field in ("task", "method"):
            if field in config[name]:
                raise UserError(f"config.{name} sets {field}, which is for the whole search to say: drop it")
    if config.layers not in spaces.LAYERS:
        raise UserError(f"config.layers {config.layers!r:.60} is unknown: {nearest(str(config.layers), spaces.LAYERS)}")
    if not isinstance(config.warm_start, bool):
        raise UserError(f"config.warm_start must be True or False, got {config.warm_start!r:.60}")
    spaces.check(config.space)
    standard = flatten(configs.default("mrpc", "fishpal").fishpal.to_dict())
    kinds = {candidate.method for candidate in config.space.values()}
    for names, value in flatten(config.run.to_dict().get("fishpal", {})).items():
        known = names[0] == "learning_rates" and names[1:] and names[1] in kinds
        if names in standard and value != standard[names] and not known:
            told = f"config.run.fishpal.{'.'.join(names)}"
            raise UserError(f"{told} is set, but the space says what to choose from: drop it")
    everything = spaces.largest(config.space)
    full = config_of(config, everything, False)
    for where, run in (("a run of the front", full), ("a trial", config_of(config, everything, True))):
        try:
            checks.check(run)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        compare.check_fair(where, run, full)
    needs_optuna()


def recipe(config: Config, short: bool) -> dict[str, Any]:
    """The fields of a recipe that are not the defaults.

    The plan is left out, and where the data lie. So are the seeds of the full recipe, since some can be added.
    """
    left_out = {"fishpal.plan", "data.path", *(() if short else ("seeds",))}
    found = configs.chosen(config_of(config, spaces.largest(config.space), short))
    return {name: value for name, value in found.items() if name not in left_out}
