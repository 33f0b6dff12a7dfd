"""Compares finished runs: python -m jpeft.report runs/mnli_fishpal runs/mnli_lora

Prints a table with one row a run. It also writes, where a file is given:

    --html page.html    tables that sort, learning curves, confusion matrices, calibration and more, in one file
    --latex table.tex   the table for LaTeX (needs its package booktabs)
    --csv table.csv     the table, comma-separated
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.report import formats
from jpeft.report.tables import REPORT, compare, table

Writer = Callable[[Sequence[Path], Sequence[dict]], str]


def _html(workdirs: Sequence[Path], reports: Sequence[dict]) -> str:
    from jpeft.report.page import finished, page  # with Matplotlib, which takes a second

    names = [path.name or str(path) for path in workdirs]
    alike = len(set(names)) < len(names)
    return page([finished(path, str(path) if alike else path.name) for path in workdirs])


WRITERS: dict[str, Writer] = {
    "--html": _html,
    "--latex": lambda _, reports: formats.latex(table(reports)),
    "--csv": lambda _, reports: formats.separated(table(reports)),
}


def parsed(argv: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """The workdirs, and the file for each writer that is asked for.

    Raises:
      UserError: if a flag is unknown or has no file, or no workdir is named.
    """
    workdirs, asked, rest = [], {}, iter(argv)
    for argument in rest:
        flag, has_value, value = argument.partition("=")
        if not flag.startswith("--"):
            workdirs.append(Path(argument))
        elif flag not in WRITERS:
            raise UserError(f"unknown flag {flag!r}: {nearest(flag, WRITERS)}")
        else:
            value = value if has_value else next(rest, "")
            if not value or value.startswith("--"):
                raise UserError(f"{flag} needs the name of a file to write")
            asked[flag] = Path(value)
    if not workdirs:
        raise UserError("name one or more workdirs: python -m jpeft.report runs/a runs/b")
    return workdirs, asked


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
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        workdirs, asked = parsed(argv)
        missing = [str(folder) for folder in workdirs if not (folder / "report.json").is_file()]
        if missing:
            raise UserError(f"no report.json in {', '.join(missing)}: is the run finished?")
        reports = [_report(folder) for folder in workdirs]
        texts = {path: WRITERS[flag](workdirs, reports) for flag, path in asked.items()}
        print(compare(reports))
        for path, text in texts.items():
            files.write_text(path, text)
            print(f"written: {path}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
