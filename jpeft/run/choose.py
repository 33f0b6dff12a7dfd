"""What data decides before training: FishPAL's plan, leaves such as FISH's mask. Kept in files, so asked only once."""

import hashlib
import itertools
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jpeft.core import files, transform
from jpeft.core.partition import split
from jpeft.core.site import Sites
from jpeft.data import batching
from jpeft.models import Bert
from jpeft.models.pretrained import Pretrained, fingerprint
from jpeft.plans import fishpal
from jpeft.plans import plan as plans
from jpeft.plans.plan import Entry, Plan
from jpeft.report import plots
from jpeft.run import config as configs
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.measured import measure, read
from jpeft.store import modules as saved
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
        everything = fishpal.attach(candidates)
        fresh = transform.init(everything, case.key, case.sites, case.base.params)
        part, fixed = split(fresh)
        rest = {"params": case.base.params, "peft": fixed}
        loss, n = single_loss(case.model, everything), config.fishpal.num_examples
        information = _fisher(case, "fisher.safetensors", loss, {"peft": part}, n, rest)["peft"]
        _, rows = _rows(case, n)
        scores = fishpal.scores(information, len(rows), candidates, factors)
        made = fishpal.choose(scores, candidates)
        measured = {"num_examples": len(rows), "train_rows": rows.tolist(), "factors": factors, "scores": scores}
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
    numbers = itertools.count()

    def information(fn: Any, tree: Any, n: int, *rest: Any, **options: Any) -> Any:
        return _fisher(case, f"fisher_{next(numbers)}.safetensors", fn, tree, n, *rest, **options)

    setting = transform.Setting(
        loss=lambda variables, example: loss(variables, example, {}),
        logits=lambda variables, example: logits(variables, example, {}),
        variables={"params": case.base.params, "peft": fresh},
        instance="",
        sites=case.sites,
        sample=lambda n: _sample(case, n),
        fisher=information,
        key=case.key,
    )
    case.console.say(f"  {', '.join(transform.instances(method))}: looking at the data")
    prepared = transform.prepare(method, setting)
    saved.write_leaves(path, prepared)
    return prepared


def _fisher(case: Case, name: str, fn: Any, tree: Any, n: int, *rest: Any, **options: Any) -> Any:
    """Fisher information over n training examples, sorted by length; kept in the seed's folder, with a picture."""
    examples, rows = _rows(case, n)
    batches, order = batching.by_length(examples, case.buckets)
    about = {
        "model": case.config.model,
        "fingerprint": fingerprint(case.base.params),
        "leaves": fingerprint(tree),
        "task": case.config.task,
        "seed": case.seed,
        "num_examples": len(rows),
        "rows": _digest(examples),
        "labels": options.get("labels", "empirical"),
        "values": options.get("values", "square"),
    }
    key = jax.random.fold_in(case.key, zlib.crc32(b"labels"))
    path, ids = case.folder / name, rows[order].tolist()
    found = measure(path, about, case.console, fn, tree, batches, *rest, key=key, ids=ids, **options)
    title = f"Fisher information over {len(rows):,} examples\n{case.config.task}, {case.config.model}"
    plots.fisher_map(path.with_suffix(".png"), read(path)[0], title)
    return found


def _digest(examples: batching.Examples) -> str:
    """Of tokens and labels, so that other data under the same name are known as such."""
    arrays = (*examples.input_ids, *examples.token_type_ids, examples.labels)
    return hashlib.sha256(b"|".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def _rows(case: Case, n: int) -> tuple[batching.Examples, np.ndarray]:
    """At most n training examples of a seeded shuffle, and their row numbers."""
    return batching.sample(case.train, min(n, case.train.size), case.seed)


def _sample(case: Case, n: int) -> batching.Batch:
    """Likewise, as one batch in the order of the shuffle."""
    return batching.together(_rows(case, n)[0], case.buckets)
