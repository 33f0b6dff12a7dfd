"""What comes out of a search: the plans that no other beats in both score and size, their full runs, and the report."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing

from ml_collections import ConfigDict

from jpeft.core import files
from jpeft.plans import plan as plans
from jpeft.report import comparison
from jpeft.report import front as fronts
from jpeft.report.comparison import Row
from jpeft.report.front import Point
from jpeft.run.config import Config
from jpeft.workbench import compare, findings, locks, study
from jpeft.workbench import search as searches
from jpeft.workbench.trials import Search, points

__all__ = ["train", "write"]

KIND = "search"
REPORT, PICTURE, TRIALS, FRONT, CELLS = "report.md", "front.png", "search.json", "front", "cells"


def train(search: Search) -> Iterator[int]:
    """Trains the plans of the front by the full recipe, but for those that another worker is at.

    Yields:
      The number of each plan, when its runs are finished.

    Raises:
      UserError: if a run fails, or a finished one is of another config.
    """
    for point in fronts.front(points(search)):
        runs = search.folder / "full"
        lock = locks.hold(runs / str(point.number))
        if lock is None:
            search.console.say(f"  the full run of plan {point.number} is with another worker")
            continue
        with closing(lock):
            search.console.title(f"plan {point.number} of the front, by the full recipe")
            for _ in compare.run_all(_grid(search, [point]), search.folder / CELLS, runs, search.console):
                pass
        yield point.number


def _grid(search: Search, found: Sequence[Point]) -> Config:
    """The full runs of plans, as a grid for `jpeft.workbench.compare`."""
    run = search.config.run.to_dict()
    seeds = run.pop("seeds")
    variants = {
        _name(point): {"method": "fishpal", "fishpal": searches.fields(search.config.run, point.plan)}
        for point in found
    }
    grid = compare.default(variants, (search.config.task,), seeds)
    grid.run = ConfigDict(run)
    return grid


def _name(point: Point) -> str:
    return f"plan {point.number}"


def _full(search: Search, best: Sequence[Point]) -> dict[int, Row]:
    """What the full runs that are finished found, by the number of the plan."""
    outcomes = findings.outcomes(_grid(search, best), search.folder / CELLS) if best else []
    rows = comparison.summarise(outcomes)[search.task.name] if outcomes else {}
    return {point.number: rows[name] for point in best if (name := _name(point)) in rows}


def write(search: Search) -> str:
    """Writes what there is so far, and returns the page: report.md, front.png, search.json and the front's plans."""
    with locks.alone(search.folder):
        every, tried = study.trials(search.study), points(search)
        best = fronts.front(tried)
        full, metric, folder = _full(search, best), search.task.primary, search.folder
        title = f"{search.task.name}, {search.config.run.model}"
        diverged = [each.number for each in study.counted(every) if each.state == "fail"]
        front = {point.number for point in best}
        rows = [
            {**point._asdict(), "plan": json.loads(plans.dumps(point.plan)), "front": point.number in front}
            for point in tried
        ]
        scores = {
            str(number): {"mean": row.mean, "std": row.std, "seeds": row.num_seeds} for number, row in full.items()
        }
        about = {"task": search.task.name, "model": search.config.run.model, "primary_metric": metric}
        files.write_record(folder / TRIALS, KIND, {**about, "trials": rows, "diverged": diverged, "full": scores})
        for point in best:
            files.write_text(folder / FRONT / f"{point.number}.json", plans.dumps(point.plan))
        for path in (folder / FRONT).glob("*.json"):
            if path.stem not in map(str, front):
                path.unlink()  # it was on the front of fewer trials
        if tried:
            fronts.picture(folder / PICTURE, tried, full, metric, f"Search on {title}")
        page = fronts.markdown(
            title, metric, tried, search.wanted, diverged, full, search.baseline, PICTURE if tried else None
        )
        files.write_text(folder / REPORT, page)
        return page
