"""Compares methods, plans or any settings: python -m jpeft.compare --config configs/compare_methods.py

Every cell of the grid of variants, tasks, learning rates and seeds is a run as `jpeft.main` makes it, by the recipe in
`config.run` whatever the method (METHOD,TASK has recipes of their own for `full`, `head` and masks). Run again, the
command resumes; finished cells are kept as small files of scores and predictions. The workdir then holds report.md
and report.html, with the scores, their spread over seeds, the differences with their intervals, and pictures. Where
the config names curves, they have a table and a picture of scores along an axis; where it names a file of published
scores, these have a column. report.csv and report.tex hold the table of scores. Any field can be set on the command
line:

    python -m jpeft.compare --config configs/compare_methods.py --config.tasks="('mrpc', 'cola')"
    python -m jpeft.compare --config configs/compare_methods.py --config.run.model=minilm --config.seeds="(1, 2)"
"""

import sys
from pathlib import Path

from jpeft.run import command

EXPLAINED = "jpeft.workbench.compare:default", command.RUN


def run(argv: list[str]) -> None:
    """Parses the command line, runs what is not finished, and writes the report."""

    def defaults() -> object:
        from jpeft.workbench import compare

        return compare.default(("lora", "pfeiffer"), ("mrpc",))

    own = {
        "workdir": "Where runs and the report go; runs/<name of the config> by default.",
        "cells": "Folder of the files of finished cells; <workdir>/cells by default.",
    }
    given = command.parse(argv, __doc__ or "", own, "configs/compare_methods.py", defaults, explained=EXPLAINED)
    from jpeft.run.console import Console
    from jpeft.workbench import compare, findings

    grid, console = given.config, Console()
    compare.check(grid)
    workdir = Path(given.flags["workdir"] or f"runs/{given.name}")
    folder = Path(given.flags["cells"] or workdir / "cells")
    try:
        for _ in compare.run_all(grid, folder, workdir / "runs", console):
            pass
    finally:  # a grid that is stopped has a report, too
        if outcomes := findings.outcomes(grid, folder):
            page = findings.write(grid, outcomes, workdir)
            console.say(f"\n{page}\nreport: {workdir / 'report.md'}; with all pictures: {workdir / 'report.html'}")


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, also after SIGTERM; 2 after one line about what the user can mend; 130 after Ctrl-C.
    """
    return command.call(run, argv)


if __name__ == "__main__":
    sys.exit(main())
