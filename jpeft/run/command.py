"""The command line of the programs: a config file, overrides of its fields, few flags; a mistake is one line."""

import argparse
import io
import json
import logging
import os
import pkgutil
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jpeft.core import files, tree
from jpeft.core.errors import UserError, nearest, one_line
from jpeft.run.stopping import Stopped, raised
from jpeft.version import __version__

__all__ = ["RUN", "Arguments", "Parser", "call", "parse"]

RUN = "jpeft.run.config:default"
MOST_SHOWN = 1000  # characters of a message


class Parser(argparse.ArgumentParser):
    """For programs without a config; a mistake is a `UserError`."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises in place of exiting."""
        raise UserError(f"{message}; see --help")


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
    argv: list[str],
    doc: str,
    own: Mapping[str, str],
    example: str,
    defaults: Callable[[], Any],
    names: bool = False,
    explained: Sequence[str] = (RUN,),
) -> Arguments:
    """Parses a command line, or prints the help and exits.

    Args:
      argv: the program's name first.
      doc: stands above the flags in the help.
      own: {flag: help}, the flags besides --config.
      example: a value of --config.
      defaults: makes the config whose fields the help shows.
      names: whether --config can be METHOD,TASK in place of a file.
      explained: the functions "module:name" whose docstrings say what the fields mean, for the help.

    Raises:
      UserError: for whatever is wrong.
    """
    argv = _named(argv) if names else argv
    if "--version" in argv[1:]:
        print(f"jpeft {__version__}")
        raise SystemExit(0)
    text = "A file such as configs/fishpal_mnli.py, or METHOD,TASK." if names else f"A file such as {example}."
    if any(arg in ("-h", "-help", "--help", "--helpshort", "--helpfull") for arg in argv[1:]):
        told = {"config": text, **own, "version": "Prints the version."}
        wide = max(map(len, told)) + 2
        lines = [f"  --{name:{wide}}{help}" for name, help in told.items()]
        print(f"{doc}\nFlags:\n" + "\n".join(lines))
        print("\nFields of the config and their defaults:\n")
        _show(defaults(), explained)
        raise SystemExit(0)
    given = [arg.split("=", 1)[1] for arg in argv if arg.startswith(("--config=", "-config="))]
    given += [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg in ("--config", "-config")]
    if not given or not given[0]:
        raise UserError(f"--config is {'empty' if given else 'missing'}: for example --config {example}")
    path = Path(given[0].split(":")[0])
    if names and not path.is_file() and re.fullmatch(r"[\w+]+", given[0]):
        raise UserError(f"--config {given[0]} is neither a file nor METHOD,TASK: for example lora,mrpc")
    if not path.is_file():
        have = [str(other) for other in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise UserError(f"config file {str(path)!r} does not exist" + (f": {nearest(str(path), have)}" if have else ""))
    made = _made(given[0], defaults())
    argv, patterns = _patterns(argv, made)
    _check_overrides(argv, [".".join(("config", *names)) for names in tree.flatten(made.to_dict())], made)
    # Not absl's global flags: a program can be called more than once, and overrides come from its `argv`.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string=text, flag_values=values, sys_argv=argv)
    for name, help in own.items():
        flags.DEFINE_string(name, None, help, flag_values=values)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}: {nearest(error.flagname, ['config', *own])}") from None
    except (flags.Error, AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"--config: {one_line(error)}") from None
    for name, help in own.items():
        if values[name].value == "":
            raise UserError(f"--{name} is empty: {help[0].lower()}{help[1:]}")
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --config.train.num_epochs=3")
    stem, _, variant = Path(config_flags.get_config_filename(values["config"])).name.partition(":")
    name = variant.replace(",", "_") if "," in variant else Path(stem).stem + (f"_{variant}" if variant else "")
    config: Any = values["config"].value
    config.update_from_flattened_dict(patterns)
    return Arguments(config, name, {flag: values[flag].value for flag in own})


def call(program: Callable[[list[str]], None], argv: list[str] | None) -> int:
    """Calls a program and returns its exit code.

    0, also after SIGTERM; 2 after one line about what the user can mend; 130 after an interrupt from the keyboard;
    141, without a word, if what it prints into was closed.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    for name in ("asyncio", "absl"):  # where Orbax's futures complain of a failure that is one line below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # where the terminal has no such sign, another stands in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with raised():
            try:
                program(sys.argv if argv is None else argv)
            finally:
                sys.stdout.flush()
    except UserError as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it exits
        return 141
    except IsADirectoryError as error:
        told = "where a file is to be written: delete it" if error.filename2 else "expected a file"
        print(f"error: {error.filename2 or error.filename} is a folder, {told}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written: the machine's, and not a bug
        print(f"error: {_line(error)}; what was saved before is intact", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"\n{stopped}; the same command resumes", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if "Unable to initialize backend" in str(error):
            print(f"error: {_line(error):.200}", file=sys.stderr)
            return 2
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = "in a training, try a smaller config.train.batch_size"
        print(f"error: out of memory ({_line(error):.150}): {told}", file=sys.stderr)
        return 2
    return 0


def _line(error: Exception) -> str:
    """The message in one line, with what no terminal can show escaped, and no longer than anyone reads."""
    line = one_line(error).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN // 2]} ... {line[-MOST_SHOWN // 2 :]}"


def _show(config: Any, explained: Sequence[str]) -> None:
    """Prints the fields and their values, with what the docstrings of these functions say of them."""
    meanings: dict[str, str] = {}
    for name in reversed(explained):  # the first one's words go before the others'
        meanings |= _meanings(pkgutil.resolve_name(name).__doc__ or "")
    shown = None
    for path, value in tree.flatten(config.to_dict()).items():
        own = path[1:] if path[0] == "run" else path  # in a comparison or a search
        name = next((name for n in range(len(own), 0, -1) if (name := ".".join(own[:n])) in meanings), None)
        if name is not None and name != shown:
            print(textwrap.fill(meanings[name], 110, initial_indent="  # ", subsequent_indent="  # "))
        shown = name
        print(f"  --config.{'.'.join(path)}{'  (not set)' if value is None else '=' + _quoted(str(value))}")


def _meanings(doc: str) -> dict[str, str]:
    """What a docstring says of fields: {name: text}, of arguments and of the points of a list, "- `name`: text"."""
    points = re.findall(r"^ *- `([\w.]+)`: (.*?)(?=^ *- |^ *$|\Z)", doc, re.MULTILINE | re.DOTALL)
    points += re.findall(r"^      (\w+): (.*?)(?=^ {0,6}\S|^ *$|\Z)", doc, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in points}


def _made(given: str, standard: Any) -> Any:
    """The config that a file makes.

    Raises:
      UserError: if the file fails, or makes something else than a config with the fields of `standard`.
    """
    path, _, variant = given.partition(":")
    try:
        defined = runpy.run_path(path)
        if "get_config" not in defined:
            raise UserError(f"config file {path!r} does not define get_config()")
        config = defined["get_config"](*([variant] if variant else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config file is a program
        raise UserError(f"config file {path!r}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"config file {path!r}: get_config() returned {kind}, expected a ConfigDict")
    missing = set(standard) - set(config)
    if missing:
        raise UserError(f"config file {path!r}: the config lacks {', '.join(sorted(missing))}: start from default()")
    return config


def _patterns(argv: list[str], config: Any) -> tuple[list[str], dict[str, Any]]:
    """Takes the overrides of fields that are dicts, such as rank_pattern, out of the arguments, and parses them."""
    rest, found = [], {}
    for arg in argv:
        name, equals, text = arg.lstrip("-").partition("=")
        names = name.split(".")[1:]
        if not (equals and names and arg.startswith("-") and _type(config, names) is dict):
            rest.append(arg)
            continue
        try:
            value = json.loads(text, object_pairs_hook=files.once)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            example = '{"layer_0/.*/query": 4}'
            raise UserError(f"--{name} must be a JSON object without duplicate names, as '{example}', got {text!r}")
        if ".".join(names) in found:
            raise UserError(f"--{name} is given twice")
        found[".".join(names)] = value
    return rest, found


def _type(config: Any, names: list[str]) -> Any:
    """The type of a field; None if there is no such field."""
    for name in names[:-1]:
        config = config.get(name) if isinstance(config, ConfigDict) else None
    return config.get_type(names[-1]) if isinstance(config, ConfigDict) and names[-1] in config else None


def _check_overrides(argv: list[str], fields: list[str], config: Any) -> None:
    seen = set()
    for arg in argv[1:]:
        if not arg.startswith("-"):
            continue
        name = arg.split("=", 1)[0].lstrip("-")
        if name.startswith("config.") and name not in fields:
            raise UserError(f"{name} is not a field of the config: {nearest(name, fields)}")
        if name in seen:
            raise UserError(f"--{name} is given twice")
        if re.fullmatch(r"\s*{[^:]+}\s*", arg.partition("=")[2]):  # a set of Python's, which would be taken for a tuple
            raise UserError(f"--{name} must be a tuple, such as (1, 2), got {arg.partition('=')[2]!r}")
        kind, text = _type(config, name.split(".")[1:]) if "." in name else None, arg.partition("=")[2]
        if kind in NUMBERS and "=" in arg and not _reads(kind, text):
            raise UserError(f"--{name} must be {NUMBERS[kind]}, got {text!r}")
        seen.add(name)


NUMBERS = {int: "a whole number", float: "a number"}


def _reads(kind: Any, text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _quoted(text: str) -> str:
    """As one types it in a shell."""
    return f'"{text}"' if "'" in text else shlex.quote(text)


def _named(argv: list[str]) -> list[str]:
    """The arguments with METHOD,TASK as a variant of the packaged config file, which takes them."""
    file = str(Path(__file__).parent / "glue.py")

    def full(given: str) -> str:
        return f"{file}:{given}" if "," in given and ":" not in given and not Path(given).is_file() else given

    argv = [f"--config={full(x.split('=', 1)[1])}" if x.startswith(("--config=", "-config=")) else x for x in argv]
    return [full(x) if i and argv[i - 1] in ("--config", "-config") else x for i, x in enumerate(argv)]
