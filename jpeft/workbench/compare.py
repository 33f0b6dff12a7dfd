"""Runs a grid of experiments: variants x tasks x learning rates x seeds, each cell a run like any other.

A finished cell is one small JSON file with the scores and the predictions. It alone counts: cells that have one are not
run again, wherever it was made, and reports are made from these files. So a grid can be stopped at any time, taken up
on another machine, or shared among several.
"""

import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.core.tree import flatten
from jpeft.data.task import Task
from jpeft.report.comparison import Outcome
from jpeft.run import config as configs
from jpeft.run import experiment
from jpeft.run.config import Config
from jpeft.run.console import Console

__all__ = ["Cell", "cells", "check", "config_of", "default", "outcomes", "run_all"]


class Cell(NamedTuple):
    """One run of a grid; `learning_rate` is None for the method's own."""

    task: str
    variant: str
    learning_rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Of its file and folder: "mrpc-lora-11", "mrpc-lora-0.001-11"."""
        rate = [] if self.learning_rate is None else [f"{self.learning_rate:g}"]
        return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join([self.task, self.variant, *rate, str(self.seed)]))


def default(
    variants: Sequence[str] | Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str],
    seeds: Sequence[int] = (11, 22, 88),
    learning_rates: Sequence[float] = (),
) -> Config:
    """The config of a comparison.

    Args:
      variants: what is compared: names of methods, or {name: fields of a run's config}, such as
        {"LoRA 4": {"method": "lora", "peft": {"lora": {"rank": 4}}}}.
      tasks: on which tasks.
      seeds: with which seeds; one for all, so that differences are paired.
      learning_rates: () for each method's own.

    Returns:
      A config with these fields, with `run`, a run's config with what all cells share, and with `by_task`, fields of
      a run's config for single tasks.
    """
    if not isinstance(variants, Mapping):
        variants = {name: {"method": name} for name in variants}
    shared = configs.default("mrpc", "head")
    for name in ("task", "method", "seeds"):
        del shared[name]
    return ConfigDict(
        {
            "run": shared,
            "variants": {name: dict(fields) for name, fields in variants.items()},
            "tasks": tuple(tasks),
            "seeds": tuple(seeds),
            "learning_rates": tuple(learning_rates),
            "by_task": {},
        }
    )


def cells(grid: Config) -> list[Cell]:
    """All cells, seed by seed, so that a grid that is stopped early has compared everything once."""
    return [
        Cell(task, variant, rate, seed)
        for task in grid.tasks
        for seed in grid.seeds
        for rate in grid.learning_rates or (None,)
        for variant in grid.variants
    ]


def config_of(grid: Config, cell: Cell) -> Config:
    """The config of a cell's run.

    Raises:
      UserError: if the grid sets a field that a run does not have.
    """
    config = configs.default(cell.task, "head")
    shared = grid.run.to_dict()
    for where, fields in (
        ("run", shared),
        (f"by_task[{cell.task!r}]", grid.by_task.get(cell.task, {})),
        (f"variants[{cell.variant!r}]", grid.variants[cell.variant]),
    ):
        _set(config, fields if isinstance(fields, dict) else fields.to_dict(), where)
    config.task, config.seeds = cell.task, (cell.seed,)
    if cell.learning_rate is not None:
        config.train.learning_rate = cell.learning_rate
    return config


def _set(config: Config, fields: Mapping[str, Any], where: str) -> None:
    known = {".".join(names) for names in flatten(config.to_dict())}
    for names, value in flatten(fields).items():
        name = ".".join(names)
        if name not in known:
            raise UserError(f"config.{where}: {name!r} is not a field of a run: {nearest(name, known)}")
        config.update_from_flattened_dict({name: value})  # None, too: it is a value, as of a prefix's `mlp_hidden`


def check(grid: Config) -> None:
    """Checks every cell before any work.

    Raises:
      UserError: for the first cell that could not run.
    """
    for name in ("variants", "tasks", "seeds"):
        if not grid[name]:
            raise UserError(f"config.{name} is empty: there is nothing to compare")
    names = [cell.name for cell in cells(grid)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two cells are called {twice!r}: give the variants, tasks, rates and seeds distinct names")
    for cell in cells(grid):
        try:
            configs.check(config_of(grid, cell))
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from None


def run_all(grid: Config, folder: Path, workdir: Path, console: Console) -> Iterator[Cell]:
    """Runs the cells that have no file in `folder` yet.

    Args:
      grid: a config that `check` accepts.
      folder: of the cells' files.
      workdir: of the runs. A cell that was stopped resumes there.
      console: shows the cells and the time left.

    Yields:
      Each cell, when it is finished.

    Raises:
      UserError: if a file is of a cell with another config, or a run fails.
    """
    every = cells(grid)
    todo = [cell for cell in every if not _finished(grid, cell, folder)]
    spent: list[float] = []
    for i, cell in enumerate(todo):
        left = f", about {_duration(statistics.fmean(spent) * (len(todo) - i))} left" if spent else ""
        console.title(f"cell {len(every) - len(todo) + i + 1} of {len(every)}: {cell.name}{left}")
        start = time.monotonic()
        config = config_of(grid, cell)
        report = experiment.run(config, workdir / cell.name, console)
        files.write_json(folder / f"{cell.name}.json", _found(config, cell, report, workdir / cell.name))
        jax.clear_caches()  # programs of other cells are of no use, and hundreds of them fill the memory
        spent.append(time.monotonic() - start)
        yield cell


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _found(config: Config, cell: Cell, report: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    arrays = files.read_leaves(workdir / f"seed_{cell.seed}" / experiment.PREDICTIONS)
    logits, labels = (np.asarray(arrays[name]) for name in ("logits", "labels"))
    choice = report.get("choice")
    return {
        **cell._asdict(),
        "config": _config(config),
        "primary_metric": report["primary_metric"],
        "metrics": report["metrics"]["mean"],
        "trainable_percent": report["parameters"]["trainable_percent"],
        "added_percent": report["parameters"]["added_percent"],
        "seconds": {name: round(value, 1) for name, value in report["seconds"].items()},
        **({"choice": choice} if choice else {}),
        "versions": report["versions"],
        "predictions": _packed(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)),
        "labels": _packed(labels),
    }


def _config(config: Config) -> dict[str, Any]:
    """The fields that are not the defaults; where data and models lie is left out, since it is the machine's."""
    standard = flatten(configs.default(config.task, config.method).to_dict())
    given = {names: value for names, value in flatten(config.to_dict()).items() if value != standard[names]}
    found = {".".join(names): value for names, value in given.items() if names != ("data", "path")}
    return json.loads(json.dumps({"method": config.method, **found}))


def _packed(values: np.ndarray) -> str | list[int] | list[float]:
    """Class ids as one string of digits, where there are at most ten; values with six digits."""
    if not np.issubdtype(values.dtype, np.integer):
        return [float(f"{x:.6g}") for x in values.tolist()]
    return "".join(map(str, values)) if values.max(initial=0) < 10 else values.tolist()


def _unpacked(values: str | list[int] | list[float]) -> np.ndarray:
    return np.array([int(x) for x in values]) if isinstance(values, str) else np.array(values)


def _finished(grid: Config, cell: Cell, folder: Path) -> bool:
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return False
    row = files.read_json(path)
    if not isinstance(row, dict) or not isinstance(row.get("config"), dict):
        raise UserError(f"{path} is not the file of a cell: delete it")
    old = row["config"]
    new = _config(config_of(grid, cell))
    differ = [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]
    if differ:
        told = "; ".join(f"{name} was {_told(old, name)}, now {_told(new, name)}" for name in differ)
        raise UserError(f"{path} is of another config ({told}): choose another folder for --cells")
    return True


def _told(config: Mapping[str, Any], name: str) -> str:
    return repr(config[name]) if name in config else "not set"


def outcomes(grid: Config, folder: Path) -> list[Outcome]:
    """What the finished cells of a grid found."""
    found = []
    tasks: dict[str, Task] = {}
    for cell in cells(grid):
        if not _finished(grid, cell, folder):
            continue
        row = files.read_json(folder / f"{cell.name}.json")
        task = tasks.setdefault(cell.task, configs.task_of(config_of(grid, cell)))
        name = cell.variant if cell.learning_rate is None else f"{cell.variant} @ {cell.learning_rate:g}"
        predictions, labels = _unpacked(row["predictions"]), _unpacked(row["labels"])
        sizes = row["trainable_percent"], row["added_percent"]
        found.append(Outcome(task, name, cell.seed, predictions, labels, *sizes))
    return found
