"""The command line of the programs: a config file, overrides of its fields, few flags; a mistake is one line."""

import os
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from jpeft.core.errors import UserError, nearest

__all__ = ["Arguments", "call", "parse"]


class Arguments(NamedTuple):
    """What a command line says.

    Attributes:
      config: with the overrides.
      name: of the config, for a workdir: "fishpal_mnli", "lora_mrpc".
      flags: the program's own flags by name; None where one is not given.
    """

    config: Any
    name: str
    flags: Mapping[str, str | None]


def parse(
    argv: list[str], doc: str, own: Mapping[str, str], example: str, defaults: Callable[[], Any], names: bool = False
) -> Arguments:
    """Parses a command line, or prints the help and exits.

    Args:
      argv: the program's name first.
      doc: stands above the flags in the help.
      own: {flag: help}, the flags besides --config.
      example: a value of --config.
      defaults: makes the config whose fields the help shows.
      names: whether --config can be METHOD,TASK in place of a file.

    Raises:
      UserError: for whatever is wrong.
    """
    argv = _named(argv) if names else argv
    text = "A file such as configs/fishpal_mnli.py, or METHOD,TASK." if names else f"A file such as {example}."
    if any(arg in ("-h", "-help", "--help", "--helpshort", "--helpfull") for arg in argv[1:]):
        lines = [f"  --{name:9}{help}" for name, help in {"config": text, **own}.items()]
        print(f"{doc}\nFlags:\n" + "\n".join(lines))
        print("\nFields of the config and their defaults (see jpeft/run/config.py):\n")
        print(defaults())
        raise SystemExit(0)
    given = [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--config=", "-config="))]
    given += [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg in ("--config", "-config")]
    if not given:
        raise UserError(f"--config is missing: for example --config {example}")
    path = Path(given[0].split(":")[0])
    if not path.is_file():
        have = [str(other) for other in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise UserError(f"config file {str(path)!r} does not exist" + (f": {nearest(str(path), have)}" if have else ""))
    _check_overrides(argv, _fields(given[0]))
    # Not absl's global flags: a program can be called more than once, and overrides come from its `argv`.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string=text, flag_values=values, sys_argv=argv)
    for name, help in own.items():
        flags.DEFINE_string(name, None, help, flag_values=values)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}: {nearest(error.flagname, ['config', *own])}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--config: {' '.join(str(error).split())}") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --config.train.num_epochs=3")
    stem, _, variant = Path(config_flags.get_config_filename(values["config"])).name.partition(":")
    name = variant.replace(",", "_") if "," in variant else Path(stem).stem + (f"_{variant}" if variant else "")
    return Arguments(values["config"].value, name, {flag: values[flag].value for flag in own})


def call(program: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Calls a program and returns its exit code: 0, 2 after one line about what the user can mend, 130 if stopped."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    try:
        program(sys.argv if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


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
    file = str(Path(__file__).parent / "glue.py")

    def full(given: str) -> str:
        return f"{file}:{given}" if "," in given and ":" not in given and not Path(given).is_file() else given

    argv = [f"--config={full(x.split('=', 1)[1])}" if x.startswith(("--config=", "-config=")) else x for x in argv]
    return [full(x) if i and argv[i - 1] in ("--config", "-config") else x for i, x in enumerate(argv)]
