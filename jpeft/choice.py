"""What data decides before training: FishPAL's plan, leaves such as FISH's mask. Kept in files, so asked only once."""

from pathlib import Path
from typing import NamedTuple

from jax import Array

from jpeft import config as configs
from jpeft import files, saved, transform
from jpeft import plan as plans
from jpeft.config import Config
from jpeft.data import batching
from jpeft.fisher import fisher
from jpeft.models import Bert
from jpeft.models.pretrained import Pretrained
from jpeft.plan import Entry, Plan
from jpeft.report.console import Console
from jpeft.selection import fishpal
from jpeft.site import Sites
from jpeft.training.step import single_logits, single_loss

__all__ = ["Case", "leaves", "plan"]


class Case(NamedTuple):
    """One seed of a run.

    Attributes:
      config: of the run.
      seed: of the head, the leaves, and the examples that are looked at.
      base: the pretrained parameters with the seed's head.
      model: the encoder.
      sites: its sites.
      train: the training set.
      buckets: lengths to pad to.
      folder: `seed_<n>`, which keeps what is found.
      key: for the leaves.
      console: shows what is going on.
    """

    config: Config
    seed: int
    base: Pretrained
    model: Bert
    sites: Sites
    train: batching.Examples
    buckets: tuple[int, ...]
    folder: Path
    key: Array
    console: Console


def plan(case: Case) -> Plan:
    """FishPAL's plan: the given one, the one that an earlier start of this run measured, or a new measurement.

    It is written to `plan.json`, and what was measured to `fisher.json`.
    """
    config, path = case.config, case.folder / "plan.json"
    if path.is_file():
        return plans.read(str(path))
    if config.fishpal.plan is not None:
        made = plans.read(config.fishpal.plan)
    else:
        candidates = {name: Entry(name, configs.options(config, name)) for name in config.fishpal.candidates}
        factors = {name: config.fishpal.factors[name] for name in candidates}
        batch, rows = _sample(case, config.fishpal.num_examples)
        everything = fishpal.attach(candidates)
        fresh = transform.init(everything, case.key, case.sites, case.base.params)
        part, fixed = transform.split(fresh)
        rest = {"params": case.base.params, "peft": fixed}
        with case.console.waiting(f"  Fisher information of {', '.join(candidates)} over {len(rows)} examples"):
            information = fisher(single_loss(case.model, everything), {"peft": part}, batch, rest)["peft"]
        scores = fishpal.scores(information, len(rows), candidates, factors)
        made = fishpal.choose(scores, candidates)
        measured = {"num_examples": len(rows), "train_rows": rows, "factors": factors, "scores": scores}
        files.write_json(case.folder / "fisher.json", measured)
    files.write_text(path, plans.dumps(made))
    return made


def leaves(case: Case, method: transform.Transform | transform.Chain) -> transform.Leaves:
    """The leaves before training. If data decides any, they are written to `prepared.safetensors`."""
    fresh = transform.init(method, case.key, case.sites, case.base.params)
    if all(member.prepare is None for member in transform.members(method)):
        return fresh
    path = case.folder / "prepared.safetensors"
    if path.is_file():
        return saved.read_leaves(path)
    loss, logits = single_loss(case.model, method), single_logits(case.model, method)
    setting = transform.Setting(
        loss=lambda variables, example: loss(variables, example, {}),
        logits=lambda variables, example: logits(variables, example, {}),
        variables={"params": case.base.params, "peft": fresh},
        instance="",
        sites=case.sites,
        sample=lambda n: _sample(case, n)[0],
        key=case.key,
    )
    with case.console.waiting(f"  {', '.join(transform.instances(method))}: looking at the data"):
        prepared = transform.prepare(method, setting)
    saved.write_leaves(path, prepared)
    return prepared


def _sample(case: Case, n: int) -> tuple[batching.Batch, list[int]]:
    """At most n training examples of a seeded shuffle, and their row numbers."""
    examples, rows = batching.sample(case.train, min(n, case.train.size), case.seed)
    batch, _ = next(iter(batching.eval_batches(examples, examples.size, case.buckets)))
    return batch, rows.tolist()
