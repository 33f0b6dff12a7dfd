"""Answers GLUE's test sets for its server: python -m jpeft.submit --model runs/cola runs/mnli --output glue.zip

--model takes one folder seed_<n>/model, or one workdir, whose best seed is taken, for each task. The model of MNLI also
answers AX. The test sets must be whole; they come from the hub, or from the folder that the run had its data from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jpeft.run import command


def run(argv: list[str]) -> None:
    """Parses the command line and answers."""
    parser = command.Parser(
        "python -m jpeft.submit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="seed_<n>/model, or workdirs")
    parser.add_argument("--output", type=Path, required=True, help="a file that ends in .zip")
    parser.add_argument("--data", help="a folder <dir>/<task>/<split>.jsonl; that of each workdir by default")
    given = parser.parse_args(argv[1:])
    from jpeft.run.console import Console
    from jpeft.serving import submission

    submission.submit(given.model, given.output, Console(), given.data)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, 2 after one line about what the user can mend, 130 after an interrupt from the keyboard.
    """
    return command.call(run, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
