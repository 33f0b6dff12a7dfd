"""Runs a grid of experiments: variants x tasks x learning rates x seeds, each cell a run like any other.

A finished cell is one small file (`cells.py`). It alone counts: cells that have one are not run again, wherever it was
made, and reports are made from these files. So a grid can be stopped at any time, taken up on another machine, or
shared among several.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jpeft.core.errors import UserError, nearest
from jpeft.core.tree import flatten
from jpeft.report import published as others
from jpeft.run import checks, experiment, loading
from jpeft.run import config as configs
from jpeft.run import workdir as workdirs
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.transforms.registry import METHODS
from jpeft.workbench.cells import Cell, read, write

# Fields of `data` that say which rows a run is evaluated on.
ROWS = ("hub", "path", "validation", "validation_fraction", "split_seed", "kind", "label", "labels")

__all__ = ["Cell", "cells", "check", "check_fair", "config_of", "default", "duration", "run_all", "set_fields"]


def default(
    variants: Sequence[str] | Mapping[str, Mapping[str, Any]],
    tasks: Sequence[str],
    seeds: Sequence[int] = (11, 22, 88),
    learning_rates: Sequence[float] = (),
    curves: Mapping[str, Mapping[str, float | None]] | None = None,
    axis: str = "trained parameters, percent of base and head",
    reference: str | None = None,
    published: str | None = None,
) -> Config:
    """The config of a comparison.

    Args:
      variants: what is compared: names of methods, or {name: fields of a run's config}, such as
        {"LoRA 4": {"method": "lora", "peft": {"lora": {"rank": 4}}}}.
      tasks: on which tasks.
      seeds: with which seeds; one for all, so that differences are paired.
      learning_rates: () for each method's own.
      curves: {curve: {variant: its place on an axis}}, for a picture of scores along it; None in the place of a number
        for the percentage of parameters that the variant trains.
      axis: what the places are.
      reference: the variant that the others, and the curves, are held against.
      published: a CSV file of published scores, `jpeft.report.published`, which then stand beside those of each task.

    Returns:
      A config with these fields, with `run`, a run's config with what all cells share, and with `by_task`, fields of
      a run's config for single tasks.

    Raises:
      UserError: if the name of a variant is there twice, or has a dot in it, as those of fields on the command line do.
    """
    if not isinstance(variants, Mapping):
        if twice := next((name for name in variants if list(variants).count(name) > 1), None):
            raise UserError(f"the variant {twice!r} is named twice")
        variants = {name: {"method": name} for name in variants}
    if dotted := [name for name in variants if "." in name]:
        raise UserError(f"the variant {dotted[0]!r} has a dot in its name: choose one without")
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
            "curves": {name: dict(places) for name, places in (curves or {}).items()},
            "axis": axis,
            "reference": reference or "",
            "published": published or "",
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
        set_fields(config, fields if isinstance(fields, dict) else fields.to_dict(), where)
    config.task, config.seeds = cell.task, (cell.seed,)
    if cell.learning_rate is not None:
        config.train.learning_rate = cell.learning_rate
    return config


def set_fields(config: Config, fields: Mapping[str, Any], where: str) -> None:
    """Sets fields of a run's config.

    Args:
      config: to change.
      fields: nested, as the config is.
      where: the field of the grid that they are from, for the message.

    Raises:
      UserError: if a run has no such field, or the value cannot be one.
    """
    known = {".".join(names) for names in flatten(config.to_dict())}
    for names, value in flatten(fields).items():
        name = ".".join(names)
        if name not in known:
            raise UserError(f"config.{where}: {name!r} is not a field of a run: {nearest(name, known)}")
        try:  # None, too: it is a value, as of a prefix's `mlp_hidden`
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError):
            raise UserError(f"config.{where}: {name} cannot be {value!r:.60}") from None


def check(grid: Config) -> None:
    """Checks every cell before any work.

    Raises:
      UserError: for the first cell that could not run.
    """
    for name in ("variants", "by_task", "run", "curves"):
        if not isinstance(grid[name], ConfigDict):
            raise UserError(f"config.{name} must be a dict, got {grid[name]!r:.60}")
    for name in ("variants", "tasks", "seeds"):
        if not grid[name]:
            raise UserError(f"config.{name} is empty: there is nothing to compare")
    for curve, places in grid.curves.items():
        if not isinstance(places, ConfigDict) or not all(_is_place(x) for x in places.values()):
            raise UserError(f"config.curves[{curve!r}] must be {{variant: number}}, got {places!r:.60}")
    if grid.curves and grid.learning_rates:
        raise UserError("config.curves name variants: give each its rate, and leave config.learning_rates empty")
    named = {f"config.curves[{curve!r}]": list(places) for curve, places in grid.curves.items()}
    for where, names in {**named, "config.reference": [grid.reference] if grid.reference else []}.items():
        if unknown := [name for name in names if name not in grid.variants]:
            raise UserError(f"{where} names {unknown[0]!r}, which is no variant: {nearest(unknown[0], grid.variants)}")
    if not isinstance(grid.published, str | Path):
        raise UserError(f"config.published must be the name of a CSV file, got {grid.published!r:.60}")
    if grid.published:
        others.read(Path(grid.published))
    for rate in grid.learning_rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6:
            raise UserError(f"config.learning_rates must be positive numbers, got {rate!r:.60}")
    for name in grid.by_task:
        if name not in grid.tasks:
            raise UserError(f"config.by_task has {name!r}, which is none of the tasks: {nearest(name, grid.tasks)}")
    for name, fields in grid.variants.items():
        if not name.isprintable():
            raise UserError(f"config.variants: {name!r:.60} cannot be the name of a variant")
        if not isinstance(fields, ConfigDict):
            raise UserError(f"config.variants[{name!r}] must be a dict of fields of a run, got {fields!r:.60}")
        for field in ("task", "seeds"):
            if field in fields:
                raise UserError(f"config.variants[{name!r}] sets {field}, which is for the whole grid to say: drop it")
        if "method" not in fields:
            raise UserError(f"config.variants[{name!r}] has no method: expected one of {', '.join(METHODS)}")
    several = {"run": grid.run, **{f"by_task[{name!r}]": own for name, own in grid.by_task.items()}}
    for where, fields in several.items():
        for field in ("task", "seeds", "method"):
            if field in fields:
                raise UserError(f"config.{where} sets {field}, which is for the grid or its variants to say: drop it")
    several |= {f"variants[{name!r}]": own for name, own in grid.variants.items()}
    for where, fields in several.items() if grid.learning_rates else ():
        if dict(fields.get("train") or {}).get("learning_rate") is not None:
            raise UserError(f"config.{where} sets a learning rate, and so does config.learning_rates: drop one")
    names = [cell.name for cell in cells(grid)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two cells are called {twice!r}: give the variants, tasks, rates and seeds distinct names")
    firsts: dict[str, Config] = {}
    for cell in cells(grid):
        if cell.seed != grid.seeds[0]:
            continue
        config = config_of(grid, cell)
        config.seeds = tuple(grid.seeds)  # all at once: they are all that differs
        try:
            checks.check(config)
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from None
        check_fair(f"cell {cell.name}", config, firsts.setdefault(cell.task, config))
    names = [configs.task_of(config).name for config in firsts.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two of config.tasks are called {twice[0]!r}: give them distinct names")


def check_fair(where: str, config: Config, first: Config) -> None:
    """Checks that a run is scored as another one of its task is.

    Args:
      where: what it is, for the message.
      config: of the run.
      first: of the other one.

    Raises:
      UserError: if it is not.
    """
    if config.train.export != "last":
        raise UserError(
            f"{where}: train.export is {config.train.export!r}, but what is compared is the last epoch, since "
            "the best one is chosen by the very rows that it is scored on: drop it"
        )
    for name in ROWS if config.data.validation else (*ROWS, "train"):
        if config.data[name] != first.data[name]:
            raise UserError(
                f"{where}: data.{name} is {config.data[name]!r:.60}, in another {first.data[name]!r:.60}, "
                "but what is compared is scored on the same rows"
            )


def _is_place(x: Any) -> bool:
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x))


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
    _check_inputs(grid, folder, console)
    todo = [cell for cell in every if read(folder, config_of(grid, cell), cell) is None]
    spent: list[float] = []
    for i, cell in enumerate(todo):
        left = f", about {duration(statistics.fmean(spent) * (len(todo) - i))} left" if spent else ""
        console.title(f"cell {len(every) - len(todo) + i + 1} of {len(every)}: {cell.name}{left}")
        start = time.monotonic()
        config = config_of(grid, cell)
        report = experiment.run(config, workdir / cell.name, console)
        write(folder, config, cell, report, workdir / cell.name)
        jax.clear_caches()  # programs of other cells are of no use, and hundreds of them fill the memory
        spent.append(time.monotonic() - start)
        yield cell


def _check_inputs(grid: Config, folder: Path, console: Console) -> None:
    """Checks that finished cells were made from the data and the base model that there are now.

    Cells of one task, model and length share them, so they are loaded once.
    """
    known: dict[str, Any] = {}
    for cell in cells(grid):
        config = config_of(grid, cell)
        row = read(folder, config, cell)
        if row is None or "inputs" not in row:  # made by an earlier version, which did not write them down
            continue
        fields = [config.task, config.model, config.quantise, config.quantise_except, config.data.to_dict()]
        fields.append(config.train.max_length)
        key = json.dumps([*fields, config.train.max_train_examples, config.init_from])
        if key not in known:
            try:
                _, base, now = loading.load(config, Console(quiet=True))
                known[key] = base.config, now
            except UserError as error:
                console.warn(f"cells of {cell.task} were not held against their data: {error}")
                known[key] = None
        if known[key] is not None:
            shape, now = known[key]
            now = now._replace(results=configs.results(config, shape, now.train[0]))
            workdirs.check(row["inputs"], now, folder / f"{cell.name}.json", "--cells")


def duration(seconds: float) -> str:
    """A time in words, "2 h 5 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
