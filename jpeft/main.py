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
"""

import os
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jpeft.core.errors import UserError, nearest


def _define(argv: list[str]) -> flags.FlagValues:
    """The flags, not absl's global ones: `main` can be called more than once, and overrides come from its `argv`."""
    values = flags.FlagValues()
    text = "A file such as configs/fishpal_mnli.py, or METHOD,TASK."
    config_flags.DEFINE_config_file("config", help_string=text, flag_values=values, sys_argv=argv)
    text = "Where results go; runs/<name of the config> by default."
    flags.DEFINE_string("workdir", None, text, flag_values=values)
    return values


def _fields(given: str) -> list[str]:
    """The fields of the config that a file makes, "config.train.num_epochs" for one."""
    from jpeft.core import tree

    path, _, variant = given.partition(":")
    try:
        config = runpy.run_path(path)["get_config"](*([variant] if variant else []))
    except UserError:
        raise
    except Exception as error:  # a config file is a program
        raise UserError(f"config file {path!r}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    return [".".join(("config", *names)) for names in tree.flatten(config.to_dict())]


def _check_overrides(argv: list[str], fields: list[str]) -> None:
    for arg in argv[1:]:
        name = arg.split("=", 1)[0].lstrip("-")
        if arg.startswith(("--config.", "-config.")) and name not in fields:
            raise UserError(f"{name} is not a field of the config: {nearest(name, fields)}")


def _named(argv: list[str]) -> list[str]:
    """The arguments with METHOD,TASK as a variant of the packaged config file, which takes them."""
    file = str(Path(__file__).parent / "run" / "glue.py")

    def full(given: str) -> str:
        return f"{file}:{given}" if "," in given and ":" not in given and not Path(given).is_file() else given

    argv = [f"--config={full(x.split('=', 1)[1])}" if x.startswith(("--config=", "-config=")) else x for x in argv]
    return [full(x) if i and argv[i - 1] in ("--config", "-config") else x for i, x in enumerate(argv)]


def _parse(argv: list[str]) -> flags.FlagValues:
    """Parses the flags; whatever is wrong with them is one line."""
    argv = _named(argv)
    values = _define(argv)
    if any(arg in ("-h", "-help", "--help", "--helpshort", "--helpfull") for arg in argv[1:]):
        print(f"{__doc__}\nFlags:\n  --config   {values['config'].help}\n  --workdir  {values['workdir'].help}")
        print("\nFields of the config and their defaults (see jpeft/run/config.py):\n")
        from jpeft.run import config

        print(config.default("mnli", "fishpal"))
        raise SystemExit(0)
    given = [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--config=", "-config="))]
    given += [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg in ("--config", "-config")]
    if not given:
        raise UserError("--config is missing: for example --config fishpal,mnli,demo")
    path = Path(given[0].split(":")[0])
    if not path.is_file():
        have = [str(other) for other in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise UserError(f"config file {str(path)!r} does not exist" + (f": {nearest(str(path), have)}" if have else ""))
    _check_overrides(argv, _fields(given[0]))
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}: {nearest(error.flagname, ['config', 'workdir'])}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config: {' '.join(str(error).split())}") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --config.train.num_epochs=3")
    return values


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs the experiment.

    Returns:
      The exit code: 0, or 2 after one line about what the user can mend.
    """
    try:
        values = _parse(sys.argv if argv is None else argv)
        config = values["config"].value
        name = config_flags.get_config_filename(values["config"])
        stem, _, variant = Path(name).name.partition(":")
        stem = variant.replace(",", "_") if "," in variant else Path(stem).stem + (f"_{variant}" if variant else "")

        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
        from jpeft.run import experiment  # after the flags, so that --help and their errors come at once

        experiment.run(config, Path(values["workdir"].value or f"runs/{stem}"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
