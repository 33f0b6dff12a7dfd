"""Published scores, from a CSV file, for a comparison to stand beside."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jpeft.core.errors import UserError

__all__ = ["COLUMNS", "Published", "beside", "read", "sources"]

COLUMNS = ("method", "model", "split", "task", "metric", "score", "trainable_percent", "source")


class Published(NamedTuple):
    """A row of the file.

    Attributes:
      method: ours, or what the source calls a variant of it.
      model: the base model.
      split: of the task, "validation" or "test".
      task: its name in jpeft.
      metric: of the score.
      score: in percent, as it is printed there.
      trainable_percent: likewise; empty if the source does not say.
      source: who published it.
    """

    method: str
    model: str
    split: str
    task: str
    metric: str
    score: str
    trainable_percent: str
    source: str


def read(path: Path) -> list[Published]:
    """The rows of a file.

    Raises:
      UserError: if there is no such file, it has other columns, or a score is not a number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = list(csv.reader(file, strict=True)) or [[]]
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"published scores: {path} cannot be read: {error}") from None
    if tuple(head) != COLUMNS:
        raise UserError(
            f"published scores: the columns of {path} are {', '.join(head)!r:.80}, not {', '.join(COLUMNS)}"
        )
    for number, row in enumerate(rows, 2):
        if len(row) != len(COLUMNS):
            raise UserError(f"published scores: line {number} of {path} has {len(row)} columns, not {len(COLUMNS)}")
        if not row[5].replace(".", "", 1).removeprefix("-").isdecimal():
            raise UserError(f"published scores: line {number} of {path} has the score {row[5]!r:.40}, not a number")
    found = [Published(*row) for row in rows]
    whose = [(row.task, row.method, row.metric) for row in found]
    if twice := [row for row, key in zip(found, whose, strict=True) if whose.count(key) > 1]:
        row = twice[0]
        raise UserError(f"published scores: {path} has the {row.metric} of {row.method} on {row.task} more than once")
    return found


def beside(
    rows: Sequence[Published], variants: Mapping[str, Sequence[str]], metrics: Mapping[str, str]
) -> dict[str, dict[str, Published]]:
    """{task: {variant: what is published of it}}, by the first of its names that the task has.

    Args:
      rows: from `read`.
      variants: {variant: what it may be called there: its own name, its method}.
      metrics: {task: its primary metric}, which goes before others.
    """
    by_name: dict[tuple[str, str], Published] = {}
    for row in sorted(rows, key=lambda row: row.metric != metrics.get(row.task)):
        by_name.setdefault((row.task, row.method), row)
    found: dict[str, dict[str, Published]] = {}
    for task in dict.fromkeys(row.task for row in rows):
        for variant, names in variants.items():
            if name := next((name for name in names if (task, name) in by_name), None):
                found.setdefault(task, {})[variant] = by_name[task, name]
    return found


def sources(rows: Sequence[Published]) -> list[str]:
    """Who published these, on which model and which split: one line each."""
    return list(dict.fromkeys(f"{row.source} ({row.model}, {row.split} split)" for row in rows))
