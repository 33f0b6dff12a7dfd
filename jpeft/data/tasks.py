"""The GLUE tasks: what their columns, labels and metrics are, and how to load them from the hub or from a folder.

A folder holds one subfolder a task and one file a split, `mnli/train.jsonl` for instance, with the hub's column names.
It ends in `.jsonl`, `.jsonl.gz`, `.parquet`, `.csv`, `.csv.gz`, `.tsv` or `.tsv.gz`; the first that is there counts.
CSV and TSV files start with a header. A TSV file is split at its tabs, quotes in it mean nothing.
"""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jpeft.core.errors import UserError, nearest, one_line
from jpeft.data import checking, hub
from jpeft.data.rows import ENDINGS, columns
from jpeft.data.task import Splits, Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TASKS", "Glue", "Splits", "Task", "load", "read_task", "task"]

HUB = "nyu-mll/glue"
FOLDER_VARIABLE = "JPEFT_GLUE_DIR"


class Glue(Task):
    """A task of the GLUE benchmark, from the hub or from a folder."""

    def splits(self, path: str | None = None) -> Splits:
        """As `load`."""
        return load(self.name, path)


_NLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "matthews_correlation"),
        Glue("sst2", ("sentence",), ("negative", "positive")),
        Glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Glue("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearmanr"), "pearson", label_range=(0.0, 5.0)),
        Glue(
            "mnli",
            ("premise", "hypothesis"),
            _NLI,
            eval_split="validation_matched",
            optional_splits=("validation_mismatched", "test_matched", "test_mismatched"),
        ),
        Glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        Glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        Glue("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        Glue("ax", ("premise", "hypothesis"), _NLI, eval_split="test", optional_splits=(), trainable=False),
        Glue("synthetic", ("premise", "hypothesis"), _NLI, eval_split="test", optional_splits=()),
    )
}


def task(name: str) -> Task:
    """Returns the task of this name.

    Args:
      name: a key of `TASKS`.

    Raises:
      UserError: if there is none.
    """
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown: {nearest(name, TASKS)}")
    return TASKS[name]


def read_task(file: str) -> Task:
    """The task that a Python file defines, as its `get_task()`.

    Raises:
      UserError: if there is no such file, it fails, or it defines something else.
    """
    if not Path(file).is_file():
        raise UserError(f"config.task {file!r}: there is no such file")
    try:
        defined = runpy.run_path(file)
        if "get_task" not in defined:
            raise UserError(f"task file {file!r} does not define get_task()")
        found = defined["get_task"]()
    except UserError:
        raise
    except SystemExit:
        raise UserError(f"task file {file!r} exits: expected it to define get_task()") from None
    except Exception as error:  # a task file is a program
        raise UserError(f"task file {file!r}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(found, Task):
        raise UserError(f"task file {file!r}: get_task() returned {type(found).__name__}, expected a jpeft Task")
    try:
        checking.check_task(found)
    except UserError as error:
        raise UserError(f"task file {file!r}: {error}") from None
    return found


def load(name: str, path: str | os.PathLike[str] | None = None) -> Splits:
    """Loads the splits of a task.

    Args:
      name: a key of `TASKS`.
      path: a folder with a subfolder for the task, laid out as described above. None means the folder that the
        environment variable JPEFT_GLUE_DIR names, or the hub where it is not set.

    Returns:
      The splits and what deserves a warning. A label of -1, hidden, occurs in test splits only.

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
    try:
        splits = hub.load(HUB, spec.name)
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
        present = sorted(p.name for p in folder.iterdir() if p.is_dir())
        hint = nearest(spec.name, present) if present else f"{folder} has no folders"
        raise UserError(f"no folder {home}; {hint}")
    splits = {}
    for split in (*spec.required_splits, *spec.optional_splits):
        file = next((f for ending in ENDINGS if (f := home / (split + ending)).is_file()), None)
        if file is not None:
            splits[split] = Dataset.from_dict(columns(file, spec, hidden=split.startswith("test")))
        elif split in spec.required_splits:
            raise UserError(f"no {split!r} split in {home}; looked for {', '.join(split + e for e in ENDINGS)}")
    return splits
