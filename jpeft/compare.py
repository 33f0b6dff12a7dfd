"""Compares methods, plans or any settings: python -m jpeft.compare --config configs/compare_methods.py

Every cell of the grid of variants, tasks and seeds is a run as `jpeft.main` makes it. Run again, the command resumes;
finished cells are kept as small files of scores and predictions. The workdir then holds report.md, with the scores,
their spread over seeds and the differences with their intervals, and a picture; where the config names curves, also a
table and a picture of scores along an axis. Any field can be set on the command line:

    python -m jpeft.compare --config configs/compare_methods.py --config.tasks="('mrpc', 'cola')"
    python -m jpeft.compare --config configs/compare_methods.py --config.run.model=minilm --config.seeds="(1, 2)"
"""

import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.run import command


def run(argv: list[str]) -> None:
    """Parses the command line, runs what is not finished, and writes the report."""

    def defaults() -> object:
        from jpeft.workbench import compare

        return compare.default(("lora", "pfeiffer"), ("mrpc",))

    own = {
        "workdir": "Where runs and the report go; runs/<name of the config> by default.",
        "cells": "Folder of the files of finished cells; <workdir>/cells by default.",
    }
    given = command.parse(argv, __doc__ or "", own, "configs/compare_methods.py", defaults)
    from jpeft.run.console import Console
    from jpeft.workbench import compare

    grid, console = given.config, Console()
    compare.check(grid)
    workdir = Path(given.flags["workdir"] or f"runs/{given.name}")
    folder = Path(given.flags["cells"] or workdir / "cells")
    try:
        deque(compare.run_all(grid, folder, workdir / "runs", console), maxlen=0)
    finally:  # a grid that is stopped has a report, too
        if outcomes := compare.outcomes(grid, folder):
            page = _report(grid, outcomes, workdir)
            console.say(f"\n{page}\nreport: {workdir / 'report.md'}")


def _report(grid: Any, outcomes: Sequence[Any], workdir: Path) -> str:
    from jpeft.core import files
    from jpeft.report import comparison, series
    from jpeft.workbench import compare

    table, baselines = comparison.summarise(outcomes), comparison.baselines(outcomes)
    workdir.mkdir(parents=True, exist_ok=True)
    comparison.picture(workdir / "report.png", table, outcomes)
    total, unlike = len(compare.cells(grid)), compare.unlike(grid)
    page = comparison.markdown(table, len(outcomes), total, "report.png", baselines, unlike)
    if found := series.series(outcomes, grid.curves.to_dict()):
        metrics = {o.task.name: o.task.primary for o in outcomes}
        reference = {task: rows[grid.reference].mean for task, rows in table.items() if grid.reference in rows}
        series.picture(workdir / "curves.png", found, grid.axis, metrics, reference, baselines)
        page += f"\n{series.markdown(found, grid.axis, reference)}\n![Scores along {grid.axis}](curves.png)\n"
    files.write_text(workdir / "report.md", page)
    return page


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, 2 after one line about what the user can mend, or 130 if it was stopped.
    """
    return command.call(run, argv)


if __name__ == "__main__":
    sys.exit(main())
