"""A workdir belongs to one process, one config, and the data and weights that it was started with."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from flax.traverse_util import flatten_dict

from jpeft.core import files, locks
from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.data.task import Data
from jpeft.models.pretrained import Pretrained, fingerprint, identity
from jpeft.run import config as configs
from jpeft.run.config import Config
from jpeft.store.model_folder import DESCRIPTION, verify
from jpeft.version import RESULTS

__all__ = [
    "INPUTS",
    "INPUTS_KIND",
    "Inputs",
    "begin",
    "begun",
    "check",
    "check_config",
    "inputs",
    "locked",
    "owner",
    "read_config",
]

SHOWN = 4  # differences in a message
MOST_PATH = 3000  # bytes; systems take 4,096, and the names of the files below need some
CONFIG, INPUTS, LOCK = "config.json", "inputs.json", ".lock"
WRITTEN = (CONFIG, INPUTS, "report.json", "report.md", "metrics.jsonl", "curves.png", "choice.png")


class Inputs(NamedTuple):
    """What a run computes from, besides its config; two runs with equal inputs have equal results.

    Attributes:
      source: where the data came from. It may change, as long as the rows do not.
      train: number and hash of the tokenised examples to train on, with their labels.
      dev: likewise of those to evaluate on.
      others: likewise of further splits with labels, by name.
      labels: the names of the classes.
      task: hash of the Python file that defines the task; "" for any other task.
      tokenizer: hash of the tokenizer's files.
      config: hash of the shape of the base model, as its config.json has it.
      base: hash of the pretrained parameters.
      init_from: hash of the modules that training starts from; "" where it starts anew.
      results: a number that changes when the same inputs give other results, `jpeft.run.config.results`.
    """

    source: str
    train: tuple[int, str]
    dev: tuple[int, str]
    others: dict[str, tuple[int, str]]
    labels: tuple[str, ...]
    task: str
    tokenizer: str
    config: str
    base: str
    init_from: str
    results: int


KIND, INPUTS_KIND = "config of a run", files.Kind("list of a run's inputs", get_type_hints(Inputs))


def inputs(
    data: Data, base: Pretrained, source: str, task: str = "", init_from: str | None = None, results: int = RESULTS
) -> Inputs:
    """The inputs of a run; what is fresh is left out, since each seed initialises it.

    Args:
      data: the tokenised task.
      base: the base model.
      source: where the data came from.
      task: `config.task`.
      init_from: `config.init_from`.
      results: from `jpeft.run.config.results`.

    Raises:
      UserError: if `init_from` is not a folder of modules.
    """
    given = {name: x for name, x in base.params.items() if name not in base.fresh}
    rest = {**identity(base), "base": fingerprint(given), "init_from": _modules(init_from), "results": results}
    file = files.file_hash(Path(task)) if task.endswith(".py") else ""
    others = {name: _digest(examples) for name, examples in data.others.items()}
    return Inputs(source, _digest(data.train), _digest(data.dev), others, data.task.labels, file, **rest)


def _digest(examples: Examples) -> tuple[int, str]:
    digest = hashlib.sha256()
    for array in (examples.lengths, *map(_joined, (examples.input_ids, examples.token_type_ids)), examples.labels):
        digest.update(np.ascontiguousarray(array).data)
    return examples.size, digest.hexdigest()


def _joined(rows: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def _modules(folder: str | None) -> str:
    try:
        return "" if folder is None else verify(Path(folder))["weights"]
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from None


@contextmanager
def locked(workdir: Path, warn: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Holds a workdir, made if need be, against other processes. The lock ends with the process, however it ends.

    Args:
      workdir: to hold.
      warn: called with one line if the file system has no locks, as on some clusters.

    Raises:
      UserError: if another process holds it, it is not a folder, its name is too long or not UTF-8, it lies in another
        run, or it holds something other than a run.
    """
    try:
        str(workdir).encode()  # Orbax needs a name that is UTF-8
        own = workdir.resolve()
    except (UnicodeEncodeError, ValueError, RuntimeError):  # the last of links in a circle
        raise UserError(f"workdir {str(workdir)!r} is not the name of a folder") from None
    if len(os.fsencode(own)) > MOST_PATH:
        raise UserError(
            f"workdir {str(workdir)[:40]}... has a name of {len(str(own)):,} characters: choose a shorter one"
        )
    for above in own.parents:
        if _is_ours(above / INPUTS) or (above / DESCRIPTION).is_file():
            raise UserError(f"workdir {workdir} lies in {above}, which holds another run: choose a folder beside it")
    if (own / DESCRIPTION).exists():
        raise UserError(f"workdir {workdir} holds trained modules: choose a folder of its own")
    shared = own == Path.home() or own in (Path.cwd(), *Path.cwd().parents)
    if shared and not (own / INPUTS).is_file() and next(own.iterdir(), None) is not None:
        raise UserError(
            f"workdir {workdir} holds other things than a run: choose a folder of its own, such as runs/mine"
        )
    foreign = [name for name in WRITTEN if (own / name).exists()] if not (own / LOCK).exists() else []
    if foreign and not _is_ours(own / INPUTS):
        raise UserError(f"workdir {workdir} holds a {foreign[0]} that is not of a run: choose a folder of its own")
    for seed in own.glob("seed_*"):
        if not seed.is_dir():
            raise UserError(f"{seed} is not a folder, as a seed's must be: delete it")
        for path in seed.iterdir():  # now, since the end of a run is too late for it
            if path.name in ("model", "checkpoints") and not path.is_dir():
                raise UserError(f"{path} is not a folder: delete it")
            if path.suffix in (".json", ".safetensors") and not path.is_file():
                raise UserError(f"{path} is not a file: delete it")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"workdir {workdir} is a file or in one: expected a folder") from None
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            alone = locks.take(file)
        except OSError as error:
            warn(f"workdir {workdir} cannot be locked ({error}): start no second run in it")
            alone = True
        if not alone:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"workdir {workdir} is in use by {holder}: wait until it is done, or choose another --workdir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _is_ours(path: Path) -> bool:
    """Whether a file is the list of a run's inputs, as a copied workdir has it."""
    try:
        files.read_record(path, INPUTS_KIND.name)  # also that of another version
    except UserError:
        return False
    return True


def owner(workdir: Path, config: Config, seed: int) -> str:
    """A hash of all that decides what a seed ends in.

    Its checkpoints and its result carry it, so that those of another method, seed, config or input do not pass for its
    own.
    """
    known = {name: value for name, value in configs.chosen(config).items() if name not in ("seeds", "train.together")}
    inputs = workdir / INPUTS
    read = files.read_record(inputs, INPUTS_KIND) if inputs.is_file() else {}
    read.pop("source", None)
    own = [config.task, config.method, seed, known, read]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def check_config(workdir: Path, config: Config) -> None:
    """Checks that a workdir is new or this config's; seeds may be added to those that it has, and train otherwise.

    Raises:
      UserError: if it belongs to another config.
    """
    path = workdir / CONFIG
    if not _begun(workdir):
        return
    _exists(path)
    read = files.read_record(path, KIND)
    now = _json(config)
    had = read.get("seeds")
    if isinstance(had, list) and all(seed in now["seeds"] for seed in had):
        read["seeds"] = now["seeds"]
    if isinstance(read.get("train"), dict):
        read["train"]["together"] = now["train"]["together"]  # which changes no result
    old, new = (flatten_dict(x, sep=".") for x in (read, now))
    added = {name: value for name, value in new.items() if name not in old and name not in configs.chosen(config)}
    old |= added  # fields of a later version, which are as they always were
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        told = "; ".join(f"config.{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differ[:SHOWN])
        told += f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise UserError(f"workdir {workdir} belongs to another config ({told}): choose another --workdir")


def read_config(workdir: Path) -> Config:
    """The config of the run that a workdir holds.

    Raises:
      UserError: if it holds none, or one of another version.
    """
    whole = files.read_record(workdir / CONFIG, KIND)
    read: dict[str, Any] = {**flatten_dict(whole, sep=".")}
    try:
        config = configs.default(whole["task"], whole["method"])
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
        config.update_from_flattened_dict({name: value for name, value in given.items() if value != {}})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{workdir / CONFIG} is not a config of this version: {error}") from None
    return config


def begin(workdir: Path, config: Config, now: Inputs) -> None:
    """Writes the config and the inputs of a new workdir, or compares the inputs with those it was started with.

    Raises:
      UserError: if they are others; the message says which.
    """
    path = workdir / INPUTS
    if _begun(workdir):
        _exists(path)
        check(files.read_record(path, INPUTS_KIND), now, workdir)
    else:
        for report in workdir.glob("report.*"):  # of a run whose results were removed
            report.unlink()
        files.write_record(path, INPUTS_KIND, now._asdict())
    files.write_record(workdir / CONFIG, KIND, _json(config))


def begun(workdir: Path, config: Config, now: Inputs) -> None:
    """Compares the inputs of another process with those that the first process wrote, in a copy of its workdir.

    Raises:
      UserError: if they are others.
    """
    if told := _differences(files.read_record(workdir / INPUTS, INPUTS_KIND), now):
        raise UserError(f"the inputs of this process differ from the first one's: {'; '.join(told)}")


def _begun(workdir: Path) -> bool:
    """Whether anything was computed. A run that failed before leaves its workdir to the one that is corrected."""
    return next(workdir.glob("seed_*/*"), None) is not None


def _exists(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"workdir {path.parent} holds results, but no {path.name} that says of what: choose another --workdir"
        )


def check(was: dict[str, Any], now: Inputs, path: Path, flag: str = "--workdir") -> None:
    """Compares inputs.

    Args:
      was: of a run that was started earlier.
      now: those that there are.
      path: what was made from the earlier ones.
      flag: the option that names another place.

    Raises:
      UserError: if they differ.
    """
    if told := _differences(was, now):
        raise UserError(
            f"what {path} was started with has changed: {'; '.join(told)}. Restore it, or choose another {flag}"
        )


def _differences(was: dict[str, Any], now: Inputs) -> list[str]:
    new = json.loads(json.dumps(now._asdict()))
    moved = (
        "" if was.get("source") in (None, new["source"]) else f", read from {new['source']}, was {was.get('source')}"
    )
    told = []
    for name, what in (("train", "training"), ("dev", "evaluation")):
        if was.get(name) != new[name]:
            (then, _), (n, _) = was[name], new[name]
            count = f"{then:,} rows, now {n:,}" if then != n else f"as many rows ({n:,}), with other contents"
            told.append(f"the {what} data: {count}{moved}")
    if (others := was.get("others", new["others"])) != new["others"]:  # a cell of a comparison has none
        same = "other contents" if _sizes(others) == _sizes(new["others"]) else _sizes(new["others"])
        told.append(f"the data of other splits: {_sizes(others)}, now {same}")
    if was.get("labels") != new["labels"]:
        told.append(f"the labels: {was.get('labels')!r:.100}, now {new['labels']!r:.100}")
    if was.get("task") != new["task"]:
        told.append("the file that defines the task")
    if was.get("tokenizer") != new["tokenizer"]:
        told.append("the tokenizer's files")
    if was.get("config") != new["config"]:
        told.append("the base model's config.json")
    if was.get("base") != new["base"]:
        told.append("the base model's weights")
    if was.get("init_from") != new["init_from"]:
        told.append("the modules that config.init_from names")
    if was.get("results") != new["results"]:
        numbers = f"number {was.get('results')} before, {new['results']} now"
        told.append(f"the version of jpeft, which gives other results ({numbers})")
    return told


def _sizes(others: Mapping[str, tuple[int, str]]) -> str:
    return ", ".join(f"{n:,} rows of {name}" for name, (n, _) in others.items()) or "none"


def _json(config: Config) -> dict[str, Any]:
    """As `config.json` has it: what the machine decides, written out."""
    whole = json.loads(config.to_json())
    return {**whole, "train": {**whole["train"], "dtype": configs.dtype(config)}}
