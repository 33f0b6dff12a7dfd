"""Runs an experiment: python -m jpeft.main --config configs/fishpal_mnli.py --workdir runs/mnli

`--config` is a file under configs/ or one of your own, or METHOD,TASK for any method on any task, wherever jpeft is
installed. Its small variant, for two CPU cores and without network, is `:demo` behind a file, `,demo` behind names.
Any field can be set on the command line:

    python -m jpeft.main --config lora,rte --config.model=roberta-base
    python -m jpeft.main --config configs/fishpal_mrpc.py --config.model=minilm --config.train.num_epochs=5
    python -m jpeft.main --config lora,mnli,demo --config.peft.lora.rank=4 --config.seeds="(1, 2, 3)"
    python -m jpeft.main --config lora,custom --config.data.train=reviews.csv --config.data.text=review

Run again with the same config and workdir, it resumes. The workdir then holds report.md (to read), report.json (to
parse), metrics.jsonl, and seed_<n>/model (the trained modules, for `jpeft.load`).

A run trains on all devices of the machine. To train on several machines, start the same command on each with
--distributed; see launch/.
"""

import shlex
import sys
from pathlib import Path

from jpeft.run import command


def run(argv: list[str]) -> None:
    """Parses the command line and runs the experiment."""

    def defaults() -> object:
        from jpeft.run import config

        return config.default("mnli", "fishpal")

    own = {
        "workdir": "Where results go; runs/<name of the config> by default.",
        "distributed": "This is one of several processes: auto (SLURM, a TPU pod, ...), or HOST:PORT,COUNT,INDEX.",
    }
    given = command.parse(argv, __doc__ or "", own, "fishpal,mnli,demo", defaults, names=True)
    from jpeft.run import experiment, hosts  # after the flags, so that --help and their errors come at once

    if given.flags["distributed"]:
        hosts.join(given.flags["distributed"])
    line = shlex.join(["python", "-m", "jpeft.main", *argv[1:]])
    experiment.run(given.config, Path(given.flags["workdir"] or f"runs/{given.name}"), command=line)


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, also after SIGTERM; 2 after one line about what the user can mend; 130 after Ctrl-C.
    """
    return command.call(run, argv)


if __name__ == "__main__":
    sys.exit(main())
