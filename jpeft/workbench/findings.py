"""What the finished cells of a grid found, and the report on it: a page as Markdown and as HTML, pictures, tables."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.core.tree import flatten
from jpeft.data.task import Task
from jpeft.report import comparison, document, drawings, formats, series
from jpeft.report import grid as pages
from jpeft.report import published as others
from jpeft.report.comparison import Outcome
from jpeft.report.published import Published
from jpeft.run import config as configs
from jpeft.run.config import Config
from jpeft.workbench.cells import Cell, read, unpacked
from jpeft.workbench.compare import cells, config_of

__all__ = ["RECIPE", "outcomes", "published", "unlike", "write"]

# What the runs of a fair comparison have in common.
RECIPE = (
    "model",
    "train.num_epochs",
    "train.batch_size",
    "train.max_length",
    "train.max_train_examples",
    "train.dtype",
    "train.warmup_ratio",
    "train.weight_decay",
    "train.group_by_length",
    "train.cache_frozen_layers",
    "quantise",
)


def outcomes(grid: Config, folder: Path) -> list[Outcome]:
    """What each finished cell found.

    Args:
      grid: the config of the comparison.
      folder: of the cells' files.

    Raises:
      UserError: if a file was changed, or is of a cell with another config.
    """
    found = []
    tasks: dict[str, Task] = {}
    for cell in cells(grid):
        row = read(folder, config_of(grid, cell), cell)
        if row is None:
            continue
        task = tasks.setdefault(cell.task, configs.task_of(config_of(grid, cell)))
        predictions, labels = unpacked(row["predictions"]), unpacked(row["labels"])
        logits = unpacked(row["logits"]) if "logits" in row else None
        sizes = row["trainable_percent"], row["added_percent"]
        outcome = Outcome(task, _shown(cell), cell.seed, predictions, labels, *sizes, logits)
        _check(outcome, row, folder / f"{cell.name}.json", found)
        found.append(outcome)
    return found


def _check(outcome: Outcome, row: Mapping[str, Any], path: Path, others: list[Outcome]) -> None:
    """Raises a UserError if a cell's answers do not have the score of its run, or are not of the rows of the others."""
    score, was = outcome.score(), row["metrics"][outcome.task.primary]
    if not math.isclose(score, was, abs_tol=1e-4):
        raise UserError(
            f"{path}: its answers have a {outcome.task.primary} of {score:.4f}, its run had {was:.4f}: remove the "
            "file, and the cell runs again"
        )
    first = next((other for other in others if other.task.name == outcome.task.name), outcome)
    if first.labels.shape != outcome.labels.shape or (first.labels != outcome.labels).any():
        raise UserError(
            f"{path}: {outcome.variant} and {first.variant} were not evaluated on the same rows of "
            f"{outcome.task.name}, so their differences mean nothing"
        )


def _shown(cell: Cell) -> str:
    """The variant's name in tables."""
    return cell.variant if cell.learning_rate is None else f"{cell.variant} @ {cell.learning_rate:g}"


def unlike(grid: Config) -> list[str]:
    """In what the runs of the variants differ: one line for each field of `RECIPE`."""
    told: dict[str, None] = {}  # each line once
    for task in grid.tasks:
        runs = {cell.variant: flatten(config_of(grid, cell).to_dict()) for cell in cells(grid) if cell.task == task}
        for name in RECIPE:
            values = {variant: fields[tuple(name.split("."))] for variant, fields in runs.items()}
            if len(set(values.values())) > 1:
                line = f"{name} is " + ", ".join(f"{value} for {variant}" for variant, value in values.items())
                told[line] = None
    return list(told)


def published(grid: Config) -> dict[str, dict[str, Published]]:
    """{task: {variant: what is published of it}}, from the file that the grid names; empty without one.

    Raises:
      UserError: if it is no such file.
    """
    if not grid.published:
        return {}
    methods = {cell.variant: config_of(grid, cell).method for cell in cells(grid)}
    # What is published of a method is of one of its variants, and nobody knows which.
    alone = {variant for variant, method in methods.items() if list(methods.values()).count(method) == 1}
    variants = {
        _shown(cell): (cell.variant, methods[cell.variant]) if cell.variant in alone else (cell.variant,)
        for cell in cells(grid)
    }
    firsts = {cell.task: cell for cell in reversed(cells(grid))}
    tasks = [configs.task_of(config_of(grid, cell)) for cell in firsts.values()]
    metrics = {task.name: task.primary for task in tasks}
    found = others.beside(others.read(Path(grid.published)), variants, metrics)
    return {task: rows for task, rows in found.items() if task in metrics}


def write(grid: Config, found: list[Outcome], workdir: Path) -> str:
    """Writes report.md, report.html, the table as report.csv and report.tex, and the pictures as PNG.

    Args:
      grid: the config of the comparison.
      found: from `outcomes`, not empty.
      workdir: where to.

    Returns:
      The page as Markdown.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    rows, baselines = comparison.summarise(found, reference=grid.reference), comparison.baselines(found)
    metrics = {o.task.name: o.task.primary for o in found}
    shown = pages.Grid(
        rows, len(found), len(cells(grid)), baselines, unlike(grid), published(grid), metrics, grid.reference
    )
    drawings.png(workdir / "report.png", *pages.drawing(rows, found))
    page, more = pages.markdown(shown, "report.png"), ""
    if curves := series.series(found, grid.curves.to_dict()):
        reference: Mapping[str, float] = {
            t: own[grid.reference].mean for t, own in rows.items() if grid.reference in own
        }
        table, title = series.table(curves, reference), f"Along {grid.axis}"
        picture = series.drawing(curves, grid.axis, metrics, reference, baselines)
        drawings.png(workdir / "curves.png", *picture)
        page += f"\n## {title}\n\n{formats.markdown(table)}\n\n![Scores along {grid.axis}](curves.png)\n"
        text = "Bands: three standard deviations over the seeds."
        more = f"{document.heading(title)}{document.table(table)}{document.figure(drawings.svg(*picture), text)}"
    files.write_text(workdir / "report.html", pages.html(shown, found, more))
    files.write_text(workdir / "report.csv", formats.separated(pages.scores(shown)))
    files.write_text(workdir / "report.tex", formats.latex(pages.scores(shown, pages.STAR)))
    files.write_text(workdir / "report.md", page)
    return page
