"""Data sets of the Hugging Face hub, or of a folder that `datasets` reads, as files of rows.

What names its classes (`ClassLabel`) has the names in its rows, so that they are read like a file of the user's own.
"""

import functools
import os
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


@functools.lru_cache(maxsize=8)
def fetch(name: str) -> Mapping[str, str]:
    """Loads a data set and writes its splits as JSON lines into the cache of `datasets`, once in a process.

    Args:
      name: "owner/name", or "owner/name:config" where there are several; or a local folder.

    Returns:
      {split: file} of those of `SPLITS` that there are. The files are named after their contents.

    Raises:
      UserError: if there is no such data set, the hub cannot be reached, or it has no split "train".
    """
    import datasets

    where, _, config = name.partition(":")
    try:
        open_it = datasets.load_dataset if Path(where).is_dir() else load
        found: Any = open_it(where, config or None)
    except Exception as error:  # the libraries underneath raise many unrelated types
        told = one_line(error)
        raise UserError(
            f"config.data.hub: cannot load {name!r} ({type(error).__name__}: {told:.200}); expected owner/name, "
            "owner/name:config, or a local folder"
        ) from None
    if "train" not in found:
        raise UserError(f"config.data.hub: {name!r} has no split 'train': {nearest('train', found)}")
    return {split: str(_written(found[split], split)) for split in SPLITS if split in found}


def _written(split: Any, called: str) -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "jpeft"
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{called}.{os.getpid()}.part"
    _with_names(split).to_json(beside, force_ascii=False)
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
