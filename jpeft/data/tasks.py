"""The GLUE tasks: what their columns, labels and metrics are, and how to load them from the hub or from a folder.

A folder holds one subfolder a task and one file a split, `mnli/train.jsonl` for instance, with the hub's column names.
It ends in `.jsonl`, `.jsonl.gz`, `.parquet`, `.csv`, `.csv.gz`, `.tsv` or `.tsv.gz`; the first that is there counts.
CSV and TSV files start with a header. A TSV file is split at its tabs, quotes in it mean nothing.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jpeft.core.errors import UserError, nearest
from jpeft.data.rows import ENDINGS, rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TASKS", "Splits", "Task", "load", "task"]

HUB = "nyu-mll/glue"
FOLDER_VARIABLE = "JPEFT_GLUE_DIR"
HUB_TIMEOUT = 5  # seconds


@dataclasses.dataclass(frozen=True)
class Task:
    """What there is to know about a task.

    Attributes:
      name: the hub's name of it.
      text: the columns with text, one or two.
      labels: the names of the classes in the order of their ids; () means regression on `label_range`.
      metrics: the official ones, names as in `jpeft.data.metrics`.
      primary: the one to choose by.
      eval_split: where to measure.
      optional_splits: official splits that may be absent.
      trainable: whether there is a train split.
      label_range: the least and the greatest value of a regression.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    primary: str = "accuracy"
    eval_split: str = "validation"
    optional_splits: tuple[str, ...] = ("test",)
    trainable: bool = True
    label_range: tuple[float, float] = (0.0, 5.0)

    @property
    def num_labels(self) -> int:
        """The width of the head: the number of classes, 1 for regression."""
        return len(self.labels) or 1

    @property
    def required_splits(self) -> tuple[str, ...]:
        """The splits without which loading fails."""
        return ("train", self.eval_split) if self.trainable else (self.eval_split,)


_NLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "matthews_correlation"),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearmanr"), "pearson"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            _NLI,
            eval_split="validation_matched",
            optional_splits=("validation_mismatched", "test_matched", "test_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        Task("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        Task("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        Task("ax", ("premise", "hypothesis"), _NLI, eval_split="test", optional_splits=(), trainable=False),
        Task("synthetic", ("premise", "hypothesis"), _NLI, eval_split="test", optional_splits=()),
    )
}


class Splits(NamedTuple):
    """A loaded task.

    Attributes:
      splits: a `datasets.Dataset` for each split.
      absent: the optional splits that were not found.
      empty_texts: for each split that has any, how many rows have an empty text. The rows are kept.
      source: where the data came from: a folder, a hub name, or "built in".
    """

    splits: "dict[str, Dataset]"
    absent: tuple[str, ...]
    empty_texts: dict[str, int]
    source: str


def task(name: str) -> Task:
    """Returns the task of this name.

    Args:
      name: a key of `TASKS`.

    Raises:
      UserError: if there is none.
    """
    if name not in TASKS:
        raise UserError(f"no task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]


def load(name: str, path: str | os.PathLike[str] | None = None) -> Splits:
    """Loads the splits of a task.

    Args:
      name: a key of `TASKS`.
      path: a folder with a subfolder for the task, laid out as described above. None means the folder that the
        environment variable JPEFT_GLUE_DIR names, or the hub where it is not set.

    Returns:
      The splits and what is worth a warning. A label of -1, hidden, occurs in test splits only.

    Raises:
      UserError: if there is no such task, a required split is missing or empty, the hub cannot be reached, or a row of
        a local file is not what the task says. Rows are counted from 1, after the header.
    """
    from datasets import Dataset

    spec = task(name)
    if name == "synthetic":
        from jpeft.data import synthetic

        return Splits({k: Dataset.from_list(rows) for k, rows in synthetic.generate().items()}, (), {}, "built in")
    folder = path or os.environ.get(FOLDER_VARIABLE)
    splits = _from_folder(spec, Path(folder)) if folder else _from_hub(spec)
    absent = tuple(s for s in spec.optional_splits if s not in splits)
    empty = {k: sum(not all(map(str.strip, row)) for row in _texts(spec, s)) for k, s in splits.items()}
    return Splits(splits, absent, {k: n for k, n in empty.items() if n}, str(folder or HUB))


def _texts(spec: Task, split: "Dataset") -> Iterator[tuple[str, ...]]:
    return zip(*(split[column] for column in spec.text), strict=True)


def _from_hub(spec: Task) -> "dict[str, Dataset]":
    import datasets
    from datasets import config
    from huggingface_hub import HfApi

    cached = Path(config.HF_DATASETS_CACHE) / HUB.replace("/", "___") / spec.name
    try:
        # `load_dataset` tries again for half a minute, so ask once first, unless it has a copy to fall back on.
        if not cached.exists():
            HfApi().dataset_info(HUB, timeout=HUB_TIMEOUT)
        splits = datasets.load_dataset(HUB, spec.name)
    except Exception as error:
        # The libraries underneath raise many unrelated types when there is no network.
        raise UserError(
            f"cannot load {spec.name!r} from the hub ({type(error).__name__}); for a local copy give its folder as "
            f"config.data.path or in the environment variable {FOLDER_VARIABLE}"
        ) from error
    wanted = (*spec.required_splits, *spec.optional_splits)
    return {k: splits[k] for k in wanted if k in splits}


def _from_folder(spec: Task, folder: Path) -> "dict[str, Dataset]":
    from datasets import Dataset

    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    home = folder / spec.name
    if not home.is_dir():
        here = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise UserError(f"no folder {home}; " + (nearest(spec.name, here) if here else f"{folder} has no folders"))
    splits = {}
    for split in (*spec.required_splits, *spec.optional_splits):
        file = next((f for ending in ENDINGS if (f := home / (split + ending)).is_file()), None)
        if file is not None:
            splits[split] = Dataset.from_dict(_columns(spec, file, hidden=split.startswith("test")))
        elif split in spec.required_splits:
            raise UserError(f"no {split!r} split in {home}; looked for {', '.join(split + e for e in ENDINGS)}")
    return splits


def _columns(spec: Task, file: Path, hidden: bool) -> dict[str, list[Any]]:
    """Reads and checks a file; `hidden` says whether labels may be."""
    columns: dict[str, list[Any]] = {name: [] for name in (*spec.text, "label", "idx")}
    for number, row in enumerate(rows(file), start=1):
        where = f"{file}, row {number}"
        for name in spec.text:
            if name not in row:
                raise UserError(f"{where}: no column {name!r}; {nearest(name, row)}")
            if not isinstance(row[name], str):
                raise UserError(f"{where}: {name!r} is {row[name]!r}, which is not text")
            columns[name].append(row[name])
        if "label" not in row and not hidden:
            raise UserError(f"{where}: no column 'label'; {nearest('label', row)}")
        columns["label"].append(_label(spec, row.get("label", -1), hidden, where))
        columns["idx"].append(int(row["idx"]) if str(row.get("idx")).isdecimal() else number - 1)
    if not columns["label"]:
        raise UserError(f"{file} has no rows")
    return columns


def _label(spec: Task, value: Any, hidden: bool, where: str) -> int | float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number == -1 and hidden:
        return -1 if spec.labels else -1.0
    if not spec.labels:
        low, high = spec.label_range
        if not low <= number <= high:
            raise UserError(f"{where}: label {value!r} is not a number from {low:g} to {high:g}")
        return number
    if number not in range(len(spec.labels)):
        ids = ", ".join(f"{i} ({name})" for i, name in enumerate(spec.labels))
        raise UserError(f"{where}: label {value!r} is none of {ids}")
    return int(number)
