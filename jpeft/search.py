"""Searches for plans that are good for their size: python -m jpeft.search --config configs/search_autopeft.py

Which modules, of which sizes, in which layers? Trials are runs by a short recipe, whose plans Optuna proposes; the
plans that no other beats in both score and size are then trained by the full recipe (AutoPEFT, Zhou et al. 2023,
arXiv:2301.12132). Run again, the command resumes; started several times, on one machine or on several with one file
system, its workers share the trials. The workdir then holds report.md, front.png, search.json and front/<n>.json, plans
that run with `python -m jpeft.main --config fishpal,TASK --config.model=MODEL
--config.fishpal.plan=WORKDIR/front/<n>.json`. Any field can be set on the command line:

    python -m jpeft.search --config configs/search_autopeft.py --config.trials=100
    python -m jpeft.search --config configs/search_autopeft.py --config.task=cola --config.space.prefix.sizes="(0, 8)"

It needs Optuna: pip install 'jpeft[search]'
"""

import sys
from itertools import chain
from pathlib import Path

from jpeft.run import command

EXPLAINED = "jpeft.workbench.search:default", command.RUN


def run(argv: list[str]) -> None:
    """Parses the command line, runs what is not finished, and writes the report."""

    def defaults() -> object:
        from jpeft.workbench import search

        return search.default("mrpc")

    own = {"workdir": "Where trials, runs and the report go; runs/<name of the config> by default."}
    given = command.parse(argv, __doc__ or "", own, "configs/search_autopeft.py", defaults, explained=EXPLAINED)
    from jpeft.run.console import Console
    from jpeft.workbench import best, search, trials

    console = Console()
    search.check(given.config)
    workdir = Path(given.flags["workdir"] or f"runs/{given.name}")
    begun = trials.begin(given.config, workdir, console)
    try:
        for _ in chain(trials.run_all(begun), best.train(begun)):
            best.write(begun)
    finally:  # a search that is stopped has a report, too
        page = best.write(begun)
        console.say(f"\n{page}\nreport: {workdir / 'report.md'}")


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, also after SIGTERM; 2 after one line about what the user can mend; 130 after Ctrl-C.
    """
    return command.call(run, argv)


if __name__ == "__main__":
    sys.exit(main())
