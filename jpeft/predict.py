"""Predicts for every row of a file: python -m jpeft.predict --model runs/mnli --input rows.csv --output answers.jsonl

--model is a folder seed_<n>/model, or a workdir, whose best seed is taken. Rows are answered in their order. Those that
cannot be read go to a file beside the output, with the reason. Stopped and run again, it resumes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jpeft.run import command
from jpeft.run.stopping import Stopped

if __name__ == "jpeft.predict":  # imported, this file would stand in the place of the function
    raise ImportError("jpeft.predict is a function, and a program: python -m jpeft.predict")


def run(argv: list[str]) -> None:
    """Parses the command line and predicts."""
    parser = command.Parser(
        "python -m jpeft.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="seed_<n>/model, or a workdir")
    parser.add_argument(
        "--input", required=True, help=".jsonl, .csv, .tsv, .parquet or .conll; - reads JSON lines from stdin"
    )
    parser.add_argument("--output", type=Path, required=True, help=".jsonl, .csv or .tsv")
    parser.add_argument("--text", help="the columns with text, as in premise,hypothesis; those of the task by default")
    given = parser.parse_args(argv[1:])
    from jpeft.run.console import Console
    from jpeft.serving import stream

    text = None if given.text is None else tuple(given.text.split(","))
    try:
        stream.predict(given.model, given.input, given.output, Console(), text)
    except Stopped:  # the output is not whole: not a success, as it is for a training that saved
        raise SystemExit(f"\nstopped: {given.output} is not whole") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, 2 after one line about what the user can mend, 130 after an interrupt from the keyboard.

    Raises:
      SystemExit: with code 1, if it was asked to stop.
    """
    return command.call(run, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
