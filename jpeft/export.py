"""Exports what a run trained: python -m jpeft.export --model runs/mnli --format hf --output exported

--model is a folder seed_<n>/model, or a workdir, whose best seed is taken. The folder that is written has a model card,
which says what the export changed on the evaluation split, if its data are still there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jpeft.run import command


def run(argv: list[str]) -> None:
    """Parses the command line and exports."""
    # Said again here, so that the help needs no imports; a test holds it against `jpeft.serving.export.FORMATS`.
    formats = "hf: a plain model with the modules merged; peft: an adapter for Hugging Face peft;\n"
    formats += "adapters: one for AdapterHub's adapters; stablehlo: a program that needs JAX alone;\n"
    formats += "onnx: a file for ONNX Runtime"
    parser = command.Parser(
        "python -m jpeft.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="seed_<n>/model, or a workdir")
    parser.add_argument("--format", required=True, help=formats)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--license", default="unknown", help="for the model card")
    given = parser.parse_args(argv[1:])
    from jpeft.run.console import Console
    from jpeft.serving import export

    export.export(given.model, given.format, given.output, Console(), given.license)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, also after SIGTERM; 2 after one line about what the user can mend; 130 after Ctrl-C.
    """
    return command.call(run, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
