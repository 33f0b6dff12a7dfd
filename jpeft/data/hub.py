"""Data sets of the Hugging Face hub, or of a folder that `datasets` reads, as files of rows.

What names its classes (`ClassLabel`) has the names in its rows, so that they are read like a file of the user's own.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.core.errors import UserError, nearest, one_line
from jpeft.core.files import file_hash

__all__ = ["SPLITS", "fetch", "load"]

SPLITS = ("train", "validation", "test")
TIMEOUT = 5  # seconds, for the hub to answer at all


def load(name: str, config: str | None) -> Any:
    """The splits of a data set of the hub, by name.

    `load_dataset` tries again for half a minute where there is no network. So the hub is asked once before, unless
    there is a copy to fall back on.

    Raises:
      Exception: of many unrelated types, if the hub cannot be reached or has no such data set.
    """
    import datasets
    from datasets import config as settings
    from huggingface_hub import HfApi

    if not (Path(settings.HF_DATASETS_CACHE) / name.replace("/", "___") / (config or "default")).exists():
        HfApi().dataset_info(name, timeout=TIMEOUT)
    return datasets.load_dataset(name, config)


def fetch(name: str, named: Mapping[str, str] = {}) -> Mapping[str, str]:
    """Loads a data set and writes its splits as JSON lines into the cache of `datasets`, once in a process.

    A local folder is read again where a file in it has changed.

    Args:
      name: "owner/name", or "owner/name:config" where there are several; or a local folder.
      named: what the data set calls those of `SPLITS` that have other names there, {"validation": "dev"}.

    Returns:
      {split: file} of those of `SPLITS` that there are. The files are named after their contents.

    Raises:
      UserError: if there is no such data set, the hub cannot be reached, it has no split "train" or none of a given
        name, or a split that seems to be the validation's has another name and is not given.
    """
    folder = Path(name.partition(":")[0])
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
    return _fetched(name, tuple(named.items()), tuple((path, x.st_mtime_ns, x.st_size) for path, x in files))


@functools.lru_cache(maxsize=8)
def _fetched(name: str, named: tuple[tuple[str, str], ...], files: tuple[Any, ...]) -> Mapping[str, str]:
    """Like `fetch`; `files` of a local folder, with their times, tell one state of it from another."""
    import datasets

    where, _, config = name.partition(":")
    try:
        if files:  # the cache of `datasets` may not look at what is in them
            found: Any = datasets.load_dataset(
                where,
                config or None,
                download_mode=datasets.DownloadMode.FORCE_REDOWNLOAD,
                verification_mode=datasets.VerificationMode.NO_CHECKS,  # of what they held before
            )
        else:
            found = load(where, config or None)
    except Exception as error:  # the libraries underneath raise many unrelated types
        told = one_line(error)
        raise UserError(
            f"config.data.hub: cannot load {name!r} ({type(error).__name__}: {told:.200}); expected owner/name, "
            "owner/name:config, or a local folder"
        ) from None
    called = {split: split for split in SPLITS if split in found} | dict(named)
    for split, own in {"train": "train", **called}.items():
        if own not in found:
            raise UserError(f"config.data.hub: {name!r} has no split {own!r} for the {split}: {nearest(own, found)}")
    others = [own for own in found if own not in called.values() and re.match("val|dev|eval", own)]
    if "validation" not in called and others:
        raise UserError(
            f"config.data.hub: {name!r} has no split 'validation' but {', '.join(others)}: set config.data.validation "
            f"to one of its splits, such as {others[0]}"
        )
    return {split: str(_written(found[own], split)) for split, own in called.items()}


def _written(split: Any, called: str) -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "jpeft"
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{called}.{os.getpid()}.part"
    _with_names(split).to_json(beside, force_ascii=False, double_precision=15)
    path = folder / f"{called}-{file_hash(beside)[:16]}.jsonl"
    os.replace(beside, path)
    return path


def _with_names(split: Any) -> Any:
    """The same rows with the names of classes in the place of their ids; -1, a hidden label, is none."""
    from datasets import ClassLabel, List, Value

    features = split.features.copy()
    for column, kind in split.features.items():
        of = kind.feature if isinstance(kind, List) else kind
        if not isinstance(of, ClassLabel):
            continue
        text = Value("string")
        features[column] = List(text) if isinstance(kind, List) else text
    if features == split.features:
        return split

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for column, kind in split.features.items():
            of, value = (kind.feature, row[column]) if isinstance(kind, List) else (kind, row[column])
            if isinstance(of, ClassLabel) and value is not None:
                out[column] = [_name(of, x) for x in value] if isinstance(value, list) else _name(of, value)
        return out

    return split.map(renamed, features=features)


def _name(kind: Any, number: int) -> str | None:
    return kind.int2str(number) if number >= 0 else None
