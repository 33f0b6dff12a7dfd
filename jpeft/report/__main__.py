"""Compares finished runs: python -m jpeft.report runs/mnli_fishpal runs/mnli_lora"""

import sys
from pathlib import Path

from jpeft.core.errors import UserError
from jpeft.core.files import read_record
from jpeft.report.tables import REPORT, compare


def main(argv: list[str]) -> int:
    """Prints one row for each workdir; exit code 2 if one has no report."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if not argv:
            raise UserError("name one or more workdirs: python -m jpeft.report runs/a runs/b")
        missing = [folder for folder in argv if not (Path(folder) / "report.json").is_file()]
        if missing:
            raise UserError(f"no report.json in {', '.join(missing)}: is the run finished?")
        print(compare([read_record(Path(folder) / "report.json", REPORT) for folder in argv]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
