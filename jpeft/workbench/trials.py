"""The trials of a search: what is shared by its workers, and the loop that each of them is in."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax

from jpeft.core import files, tree
from jpeft.core.errors import UserError
from jpeft.data.task import Task
from jpeft.models import Bert
from jpeft.report import front as fronts
from jpeft.report import tables
from jpeft.report.front import Point
from jpeft.run import experiment, loading
from jpeft.run import workdir as workdirs
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.workbench import compare, locks, study
from jpeft.workbench import search as searches
from jpeft.workbench import space as spaces
from jpeft.workbench.study import Claim, Study

__all__ = ["Search", "begin", "points", "run_all"]

POLL = 5.0  # seconds between looks at what other workers do
INPUTS = "search_inputs.json"


class Search(NamedTuple):
    """A search that has begun.

    Attributes:
      config: of `default`.
      folder: of the search.
      study: its database.
      task: on which.
      wanted: how many trials there are to be: no more than there are plans.
      fixed: how many parameters train with any plan, the head and what is new.
      baseline: what an answer scores that reads no text.
      console: shows what is going on.
    """

    config: Config
    folder: Path
    study: Study
    task: Task
    wanted: int
    fixed: int
    baseline: float
    console: Console


def begin(config: Config, folder: Path, console: Console) -> Search:
    """Opens a search, or begins it; reads the data and the base model, which say how large it is.

    Raises:
      UserError: if the folder is of another search, data or base model.
    """
    trial = searches.config_of(config, spaces.largest(config.space), short=True)
    console.title(f"search on {config.task} with {trial.model}, in {folder}")
    experiment.use_compilation_cache()
    data, base, inputs = loading.load(trial, console)
    num_layers, space = base.config.num_hidden_layers, config.space
    first = spaces.middles(space, config.layers, num_layers) if config.warm_start else []
    of = {
        **{name: config[name] for name in ("task", "layers", "startup", "seed", "warm_start")},
        "space": space.to_dict(),
        "run": searches.recipe(config, short=False),
        "search": searches.recipe(config, short=True),
    }
    own = study.begin(
        folder, of, spaces.choices(space, config.layers, num_layers),
        lambda point: spaces.plan_of(space, num_layers, point), first, config.startup, config.seed,
    )  # fmt: skip
    known = folder / INPUTS
    with locks.alone(folder):
        if known.is_file():
            workdirs.check(files.read_record(known, workdirs.INPUTS_KIND), inputs, folder)
        else:
            files.write_record(known, workdirs.INPUTS_KIND, inputs._asdict())
    fixed = sum(tree.count(x) for name, x in base.params.items() if name in (*Bert.HEAD, *base.fresh))
    baseline = data.task.baseline(data.train.labels, data.dev.labels)[data.task.primary]
    wanted = min(config.trials, spaces.size(space, config.layers, num_layers))
    return Search(config, folder, own, data.task, wanted, fixed, baseline, console)


def run_all(search: Search) -> Iterator[int]:
    """Runs trials until there are as many as wanted, other workers' among them, and waits for theirs.

    Yields:
      The number of each trial that this worker ran, when it is finished.

    Raises:
      UserError: if a run fails, but for one that does not stay finite, which is noted.
    """
    start, before, waited = time.monotonic(), len(_done(search)), False
    while True:
        claim = study.claim(search.study, search.wanted)
        if claim is not None:
            with closing(claim.lock):
                _say(search, claim, start, before)
                _run(search, claim)
            yield claim.number
        elif running := [each for each in study.trials(search.study) if each.state == "running"]:
            if not waited:
                search.console.say(f"  {len(running)} trials are with other workers: waiting for them")
            waited = True
            time.sleep(POLL)
        else:
            return


def points(search: Search) -> list[Point]:
    """The trials that have a score."""
    every = study.trials(search.study)
    return [Point(each.number, each.plan, *each.values, each.seconds) for each in every if each.values is not None]


def _done(search: Search) -> list[study.Trial]:
    return [each for each in study.counted(study.trials(search.study)) if each.state != "running"]


def _say(search: Search, claim: Claim, start: float, before: int) -> None:
    """The line of a trial that begins; the time left is by what all workers have done since this one began."""
    done = len(_done(search))
    seconds = (time.monotonic() - start) / max(done - before, 1) * (search.wanted - done)
    left = f", about {compare.duration(seconds)} left" if done > before else ""
    again = ", taken up again" if claim.again else ""
    lines = "; ".join(tables.plan_lines(claim.plan))
    search.console.title(f"trial {claim.number}{again} ({done} of {search.wanted} done{left}): {lines}")


def _run(search: Search, claim: Claim) -> None:
    config = searches.config_of(search.config, claim.plan, short=True)
    try:
        with search.console.waiting("training"):
            report = experiment.run(config, claim.folder, Console(quiet=True))
    except UserError as error:
        if "not finite" not in str(error):
            raise
        study.fail(search.study, claim.number, str(error))
        search.console.warn(f"trial {claim.number}: {error}")
        return
    finally:
        jax.clear_caches()  # programs of other plans are of no use, and hundreds of them fill the memory
    sizes = report["parameters"]
    score = report["metrics"]["mean"][search.task.primary]
    percent = 100 * (sizes["trainable"] - search.fixed) / (sizes["base"] + sizes["head"])
    seconds = sum(report["seconds"].values())
    study.tell(search.study, claim.number, score, percent, seconds)
    found = f"{search.task.primary} {100 * score:.1f} with {percent:.3g} % trained, {seconds:.0f} s"
    search.console.say(f"  {found}; front: {fronts.line(fronts.front(points(search)))}")
