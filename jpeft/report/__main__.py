"""Compares finished runs: python -m jpeft.report runs/mnli_fishpal runs/mnli_lora

Prints a table with one row for each run, and writes what else is asked for.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.report import formats
from jpeft.report.tables import REPORT, compare, table

Writer = Callable[[Sequence[Path], Sequence[dict]], str]


def _html(workdirs: Sequence[Path], reports: Sequence[dict]) -> str:
    from jpeft.report.page import finished, page  # with Matplotlib, which takes a second

    return page([finished(path, name) for path, name in zip(workdirs, _names(workdirs), strict=True)])


def _names(workdirs: Sequence[Path]) -> list[str]:
    names = [path.name or str(path) for path in workdirs]
    return names if len(set(names)) == len(names) else list(map(str, workdirs))


WRITERS: dict[str, tuple[Writer, str]] = {
    "html": (_html, "tables that sort, learning curves, confusion matrices, calibration and more, in one file"),
    "latex": (
        lambda dirs, reports: formats.latex(table(reports, _names(dirs))),
        "the table for LaTeX; needs its package booktabs",
    ),
    "csv": (lambda dirs, reports: formats.separated(table(reports, _names(dirs))), "the table, comma-separated"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see --help")


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The workdirs, and the file to write in each format that is asked for.

    Raises:
      UserError: if a flag is unknown or has no file, or no workdir is named.
    """
    parser = _Parser(
        "python -m jpeft.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("workdirs", type=Path, nargs="+", help="of finished runs")
    for name, (_, what) in WRITERS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    return parser.parse_args(argv)


def _report(workdir: Path) -> dict:
    """The report of a run, held against the run's inputs, where they are there.

    Raises:
      UserError: if it is none, was changed, or is that of another run.
    """
    path, inputs = workdir / "report.json", workdir / "inputs.json"
    report = files.read_record(path, REPORT)
    if inputs.is_file() and (data := report.get("data")):
        own = files.read_record(inputs, "list of a run's inputs")
        if any(own[name][1] != digest for name, digest in data.items()):
            raise UserError(f"{path} is of another run than {inputs}: restore it, or run it again")
    return report


def main(argv: list[str]) -> int:
    """Prints one row for each workdir, and writes what is asked for; exit code 2 if one has no report."""
    try:
        given = parsed(argv)
        workdirs = given.workdirs
        missing = [str(folder) for folder in workdirs if not (folder / "report.json").is_file()]
        if missing:
            raise UserError(f"no report.json in {', '.join(missing)}: is the run finished?")
        reports = [_report(folder) for folder in workdirs]
        asked = [(path, write) for name, (write, _) in WRITERS.items() if (path := getattr(given, name)) is not None]
        texts = [(path, write(workdirs, reports)) for path, write in asked]
        print(compare(reports, _names(workdirs)))
        for path, text in texts:
            files.write_text(path, text)
            print(f"written: {path}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
