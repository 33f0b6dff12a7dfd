"""Text classification, pair classification or regression on files of the user's own, without any Python."""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.data.rows import ENDINGS, columns, rows
from jpeft.data.task import Splits, Task

__all__ = ["Files", "custom"]

MAX_CLASSES = 1000  # more than these are a column of the wrong kind


@dataclasses.dataclass(frozen=True)
class Files(Task):
    """A task whose splits are files; made by `custom`.

    Attributes:
      files: the file of each split.
      label: the column with the label.
      validation_fraction: the share of the training rows to validate on, where there is no file for it.
      split_seed: of the rows that are taken for it.
    """

    files: tuple[tuple[str, str], ...] = ()
    label: str = "label"
    validation_fraction: float = 0.1
    split_seed: int = 0

    def splits(self, path: str | None = None) -> Splits:
        """Reads the files; cuts a validation split off the training rows if there is no file for it."""
        del path
        found = {name: self._read(Path(file), hidden=name == "test") for name, file in self.files}
        if "validation" not in found:
            found |= self._cut(found["train"])
        empty = {
            name: sum(not all(map(str.strip, row)) for row in zip(*(split[c] for c in self.text), strict=True))
            for name, split in found.items()
        }
        absent = () if "test" in found else ("test",)
        return Splits(found, absent, {name: n for name, n in empty.items() if n}, dict(self.files)["train"])

    def _read(self, file: Path, hidden: bool) -> dict[str, list[Any]]:
        if not self.labels:
            return columns(file, self, hidden, self.label)
        # Labels are names here, which a file of rows knows nothing of: as ids they are read like any other.
        numbers = {name: i for i, name in enumerate(self.labels)}
        found = columns(file, dataclasses.replace(self, labels=()), True, _NOWHERE)
        found["label"] = []
        for number, row in enumerate(rows(file), start=1):
            name = _class_of(row, self.label, file, number, hidden)
            if name is not None and name not in numbers:
                raise UserError(f"{file}, row {number}: label {name!r} is unknown: {nearest(name, numbers)}")
            found["label"].append(-1 if name is None else numbers[name])
        return found

    def _cut(self, train: dict[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
        size = len(train["label"])
        held = max(1, round(self.validation_fraction * size))
        if held >= size:
            raise UserError(f"{size} training rows are too few to split: set config.data.validation to a file")
        order = np.random.default_rng(self.split_seed).permutation(size)
        parts = {"train": np.sort(order[held:]), "validation": np.sort(order[:held])}
        return {name: {c: [column[i] for i in part] for c, column in train.items()} for name, part in parts.items()}


_NOWHERE = "\0"  # no file has a column of this name
MISSING = "nan"  # as other programs write it; "none" and "null" may well be classes


def custom(
    train: str,
    text: Sequence[str],
    label: str = "label",
    *,
    validation: str | None = None,
    test: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Task:
    """The task that the user's files define.

    Args:
      train: a CSV, TSV, JSON lines or parquet file, by the ending of its name.
      text: the columns with text: one, or two for pairs.
      label: the column with the class, a name or a number, or with the value of a regression.
      validation: likewise; None cuts a split off the training file.
      test: likewise; labels may be absent.
      labels: class names in the order of the logits. None takes those of the training file, sorted.
      regression: whether labels are values.
      validation_fraction: the share of the training rows to validate on, where there is no file for it.
      split_seed: of the rows that are taken for it.

    Raises:
      UserError: if a file is missing or not of a known kind, it lacks a column, or the labels are not what was said.
    """
    named = (("train", train), ("validation", validation), ("test", test))
    files = tuple((name, file) for name, file in named if file is not None)
    for name, file in files:
        if not Path(file).is_file():
            raise UserError(f"config.data.{name}: there is no file {file}")
        if not file.endswith(ENDINGS):
            raise UserError(f"config.data.{name}: {file} is of an unknown kind: expected {', '.join(ENDINGS)}")
    if not 1 <= len(text) <= 2:
        raise UserError(f"config.data.text must name one or two columns, got {tuple(text)}")
    if len(set(text)) < len(text) or label in text:
        raise UserError(
            f"config.data.text and config.data.label must name distinct columns, got {tuple(text)}, {label!r}"
        )
    if not 0 <= split_seed < 2**32:
        raise UserError(f"config.data.split_seed must be from 0 to 2**32 - 1, got {split_seed}")
    if not 0 < validation_fraction < 1:
        raise UserError(f"config.data.validation_fraction must be above 0 and below 1, got {validation_fraction}")
    classes = () if regression else _classes(Path(train), label, labels)
    names, primary = (("pearson", "spearmanr"), "pearson") if regression else (("accuracy", "macro_f1"), "accuracy")
    return Files(
        "custom", tuple(text), classes, names, primary,
        files=files, label=label, validation_fraction=validation_fraction, split_seed=split_seed,
    )  # fmt: skip


def _classes(file: Path, label: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """The class names: those given, or those that occur, in order: numbers by value, names by the alphabet."""
    if given is not None:
        if len(set(given)) < max(2, len(given)):
            raise UserError(f"config.data.labels must be at least two distinct names, got {tuple(given)}")
        return tuple(map(str, given))
    counts = Counter(_class_of(row, label, file, number) for number, row in enumerate(rows(file), start=1))
    names = [name for name in counts if name is not None]
    if all(_is_number(name) for name in names):
        fractions = [name for name in names if not float(name).is_integer()]
        if fractions:
            raise UserError(
                f"{file}: label {fractions[0]} is not a class: set config.data.regression=True if labels are values"
            )
        names.sort(key=float)
    else:
        names.sort()
    alike = Counter(map(_read_as, names))
    if alike and alike.most_common(1)[0][1] > 1:
        twins = [name for name in names if _read_as(name) == alike.most_common(1)[0][0]]
        raise UserError(
            f"{file}: the labels {' and '.join(map(ascii, twins[:2]))} differ in case, spaces or spelling only: mend "
            "them, or name all classes in config.data.labels"
        )
    if any(map(_is_number, names)) and (truths := [name for name in names if name in ("true", "false")]):
        raise UserError(
            f"{file}: the label {truths[0]!r} is among numbers: mend it, or name all classes in config.data.labels"
        )
    if missing := [name for name in names if _read_as(name) == MISSING]:
        raise UserError(
            f"{file}: the label {missing[0]!r} looks like a missing one: drop these rows, or name all classes in "
            "config.data.labels"
        )
    if len(names) < 2:
        raise UserError(f"{file} has {len(names)} different labels in column {label!r}: expected at least two")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{file} has {len(names):,} different labels in column {label!r}: is it the right column?")
    return tuple(names)


def _class_of(row: Any, label: str, file: Path, number: int, hidden: bool = False) -> str | None:
    """The class of a row as text; None if it is hidden."""
    if label not in row and not hidden:
        raise UserError(f"{file}, row {number}: no column {label!r}; {nearest(label, row)}")
    value = row.get(label)
    if value is None or value == "":
        if hidden:
            return None
        raise UserError(f"{file}, row {number}: the label is empty")
    if isinstance(value, bool):
        return str(value).lower()  # as JSON and most CSV files have it
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not np.isfinite(value)):
        raise UserError(f"{file}, row {number}: label {value!r:.60} is neither a name nor a number")
    text = str(value)
    if len(text) > 200 or not text.isprintable():
        raise UserError(f"{file}, row {number}: label {text!r:.60} cannot be the name of a class")
    return text


def _read_as(name: str) -> str:
    """What a reader takes a class name for: numbers by value, words whatever their case, spaces or encoding."""
    text = unicodedata.normalize("NFC", name).strip().casefold()
    return repr(float(text)) if _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text)).item()
    except ValueError:
        return False
