"""What data decides before training: FishPAL's plan, leaves such as FISH's mask. Cached on disk, so computed once."""

import itertools
import time
from pathlib import Path
from typing import Any

import jax

from jpeft.core import files, transform
from jpeft.core.errors import UserError
from jpeft.core.summary import summary
from jpeft.core.tree import count
from jpeft.data import batching
from jpeft.plans import fishpal
from jpeft.plans import plan as plans
from jpeft.plans.budget import Cost, allocate
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.plans.plan import Entry, Plan
from jpeft.run import config as configs
from jpeft.run import measured
from jpeft.run.config import Config
from jpeft.run.criteria import CRITERIA
from jpeft.run.seed import Seed
from jpeft.training.step import single_logits, single_loss

__all__ = ["CHOICE", "kept", "leaves", "plan", "rate"]

CHOICE = "record of a choice"  # the kind of `choice.json`


def plan(seed: Seed) -> Plan:
    """FishPAL's plan: the given one, the one that an earlier start of this run measured, or a new measurement.

    It is written to `plan.json`, and what was measured to `choice.json`.

    Raises:
      UserError: if no plan fits the budget, or the plan was edited since.
    """
    if (found := kept(seed.folder, seed.config)) is not None:
        return found
    config, start = seed.config, time.perf_counter()
    candidates = configs.candidates(config)
    if config.fishpal.criterion == "race":
        candidates = _affordable(seed, candidates)
    _best(seed, {0: dict.fromkeys(candidates, 1.0)}, candidates)  # fails on a budget that nothing fits, before any work
    found = CRITERIA[config.fishpal.criterion](seed, candidates)
    chosen = _best(seed, found.scores, candidates)
    all_passes = seed.data.train.size * config.train.num_epochs
    seconds = time.perf_counter() - start
    seed.console.say(
        f"  chosen by {config.fishpal.criterion}, at {100 * found.passes / all_passes:.1f} % of the passes of the "
        f"training, in {seconds:.0f} s"
    )
    choice = {
        "criterion": config.fishpal.criterion, "passes": found.passes, "share": found.passes / all_passes,
        "seconds": seconds, "scores": found.scores, **found.about, "plan": plans.dumps(chosen),
    }  # fmt: skip
    files.write_record(seed.folder / "choice.json", CHOICE, choice)
    files.write_text(seed.folder / "plan.json", plans.dumps(chosen))
    return chosen


def kept(folder: Path, config: Config) -> Plan | None:
    """The plan that a run was given, or that an earlier start of it chose; None if there is none yet.

    Writes it to `plan.json`, if it is not there.

    Args:
      folder: of the seed.
      config: of the run.

    Raises:
      UserError: if `plan.json` is another plan.
    """
    path, record, given = folder / "plan.json", folder / "choice.json", config.fishpal.plan
    if given is not None:
        was = plans.dumps(plans.read(given))
    elif record.is_file():
        was = files.read_record(record, CHOICE)["plan"]
    else:
        return None
    if not path.is_file():
        files.write_text(path, was)
    elif plans.dumps(plans.read(str(path))) != was:
        raise UserError(f"{path} is not the plan that this run began with: restore it, or choose another --workdir")
    return plans.loads(was)


def rate(seed: Seed) -> float:
    """The multiple of its learning rate that a seed trains at: what a race of rates found, or else 1."""
    record = seed.folder / "choice.json"
    return float(files.read_record(record, CHOICE).get("rate", 1)) if record.is_file() else 1.0


def _affordable(seed: Seed, candidates: Candidates) -> Candidates:
    """Those that fit the budget in all layers, where they race, so that the winner is what then trains.

    Raises:
      UserError: if none does.
    """
    if seed.config.fishpal.budget is None:
        return candidates
    limit, layers = _limit(seed), seed.base.config.num_hidden_layers
    costs = {name: _cost(seed, entry) for name, entry in candidates.items()}
    whole = {name: layers * cost.own + cost.shared for name, cost in costs.items()}
    if fits := {name: entry for name, entry in candidates.items() if whole[name] <= limit}:
        return fits
    least = min(whole, key=whole.__getitem__)
    raise UserError(
        f"the budget of {limit:,.0f} parameters is too small for a race, in which modules are in all layers: {least} "
        f"has {whole[least]:,} there. Add smaller sizes (config.fishpal.sizes), or take another criterion, such as "
        "adam_step"
    )


def _limit(seed: Seed) -> float:
    limit, percent = configs.budget(seed.config)
    return limit * count(seed.base.params) / 100 if percent else limit


def _best(seed: Seed, scores: Scores, candidates: Candidates) -> Plan:
    """The best candidate of each layer, or the best plan under the budget."""
    if seed.config.fishpal.budget is None:
        return fishpal.choose(scores, candidates)
    costs = {name: _cost(seed, entry) for name, entry in candidates.items()}
    return allocate(scores, candidates, costs, _limit(seed))


def _cost(seed: Seed, entry: Entry) -> Cost:
    """The parameters of a candidate in one layer, that train or that stay at inference."""
    method = plans.make(entry.method, **entry.options)
    leaves = jax.eval_shape(lambda: transform.init(method, seed.key, seed.sites, seed.base.params))
    trains = seed.config.fishpal.budget_of == "trainable"
    rows = summary(method, leaves, seed.base.params).rows
    shared = sum(row.trainable if trains else row.added for row in rows if row.layers == transform.SHARED)
    own = sum(row.trainable if trains else row.added for row in rows) - shared
    return Cost(own // seed.base.config.num_hidden_layers, shared)


def leaves(seed: Seed, method: transform.Transform | transform.Chain) -> transform.Leaves:
    """The leaves before training. If data decides any, they are written to `prepared.safetensors`."""
    fresh = transform.init(method, seed.key, seed.sites, seed.base.params)
    if all(member.prepare is None for member in transform.members(method)):
        return fresh
    path = seed.folder / "prepared.safetensors"
    if path.is_file():
        return files.read_leaves(path)
    loss, logits = single_loss(seed.model, method, seed.data.task.loss), single_logits(seed.model, method)
    numbers = itertools.count()

    def information(fn: Any, tree: Any, n: int, *rest: Any, **options: Any) -> Any:
        return measured.information(seed, f"fisher_{next(numbers)}.safetensors", fn, tree, n, *rest, **options)

    setting = transform.Setting(
        loss=lambda variables, example: loss(variables, example, {}),
        logits=lambda variables, example: logits(variables, example, {}),
        variables={"params": seed.base.params, "peft": fresh},
        instance="",
        sites=seed.sites,
        sample=lambda n: _sample(seed, n),
        fisher=information,
        key=seed.key,
    )
    seed.console.say(f"  {', '.join(transform.instances(method))}: looking at the data")
    prepared = transform.prepare(method, setting)
    files.write_leaves(path, prepared)
    return prepared


def _sample(seed: Seed, n: int) -> batching.Batch:
    """At most n training examples of a seeded shuffle, as one batch in its order."""
    return batching.together(measured.drawn(seed, n)[0], (seed.data.longest,))
