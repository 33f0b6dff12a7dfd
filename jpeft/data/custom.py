"""Tasks on files of the user's own, of any kind of answer, without any Python."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.data import classes, metrics
from jpeft.data.kinds import KINDS
from jpeft.data.rows import ENDINGS, columns
from jpeft.data.task import HIDDEN, Splits, Task

__all__ = ["Files", "custom"]


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
        empty = {} if self.answers.by_token else {name: _empty(split, self.text) for name, split in found.items()}
        absent = () if "test" in found else ("test",)
        return Splits(found, absent, {name: n for name, n in empty.items() if n}, dict(self.files)["train"])

    def _read(self, file: Path, hidden: bool) -> dict[str, list[Any]]:
        if not self.labels:
            return columns(file, self, hidden, self.label)
        numbers = {name: i for i, name in enumerate(self.labels)}

        def answer(row: Mapping[str, Any], number: int, text: Any) -> Any:
            names = classes.of_row(row, self.label, self.kind, file, number, hidden)
            for name in names or ():
                if name not in numbers:
                    twin = next((x for x in numbers if classes.alike(x, name)), None)
                    told = nearest(name, numbers) if twin is None else f"did you mean {twin!a}?"
                    shown = repr(name) if twin is None else ascii(name)
                    raise UserError(f"{file}, row {number}: label {shown} is unknown: {told}")
            if names is not None and self.answers.by_token and len(names) != len(text):
                raise UserError(f"{file}, row {number}: {len(names)} tags for {len(text)} words")
            return HIDDEN if names is None else self._number([numbers[name] for name in names])

        found = columns(file, self, hidden, self.label, answer)
        if hidden and self.kind == "multilabel" and not any(1 in row for row in found["label"] if row != HIDDEN):
            found["label"] = [HIDDEN] * len(found["label"])  # a column that is empty throughout says nothing
        return found

    def _number(self, ids: list[int]) -> Any:
        if self.kind == "multilabel":
            return [float(i in ids) for i in range(len(self.labels))]
        return ids if self.kind == "tagging" else ids[0]

    def _cut(self, train: dict[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
        size = len(train["label"])
        held = max(1, round(self.validation_fraction * size))
        if held >= size:
            raise UserError(f"{size} training rows are too few to split: set config.data.validation to a file")
        order = np.random.default_rng(self.split_seed).permutation(size)
        parts = {"train": np.sort(order[held:]), "validation": np.sort(order[:held])}
        return {name: {c: [column[i] for i in part] for c, column in train.items()} for name, part in parts.items()}


def _empty(split: dict[str, list[Any]], text: Sequence[str]) -> int:
    return sum(not all(map(str.strip, row)) for row in zip(*(split[name] for name in text), strict=True))


def custom(
    train: str,
    text: Sequence[str],
    label: str = "label",
    *,
    validation: str | None = None,
    test: str | None = None,
    labels: Sequence[str] | None = None,
    kind: str = "classification",
    validation_fraction: float = 0.1,
    split_seed: int = 0,
) -> Task:
    """The task that the user's files define.

    Args:
      train: a CSV, TSV, JSON lines, parquet or CoNLL file, by the ending of its name.
      text: the columns with text: one, or two for pairs; of tagging, one with words, a list or between spaces.
      label: the column with the class, a name or a number, or with the value of a regression; of multilabel a list of
        classes, or text with a class between semicolons; of tagging a list of tags, or text with tags between spaces.
      validation: likewise; None cuts a split off the training file.
      test: likewise; labels may be absent.
      labels: class names in the order of the logits. None takes those of the training file, sorted.
      kind: of answer, a key of `jpeft.data.kinds.KINDS`.
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
    if taken := [name for name in text if name in ("label", "idx")]:  # what splits call their own columns
        raise UserError(f"config.data.text names {taken[0]!r}, which is no name for a column with text here: rename it")
    if not 0 <= split_seed < 2**32:
        raise UserError(f"config.data.split_seed must be from 0 to 2**32 - 1, got {split_seed}")
    if not 0 < validation_fraction < 1:
        raise UserError(f"config.data.validation_fraction must be above 0 and below 1, got {validation_fraction}")
    if kind not in KINDS:
        raise UserError(f"config.data.kind {kind!r} is unknown: {nearest(kind, KINDS)}")
    if kind == "tagging" and len(text) > 1:
        raise UserError(f"config.data.text must name the one column with words, got {tuple(text)}")
    names = () if kind == "regression" else classes.classes(Path(train), label, kind, labels)
    scores = KINDS[kind].metrics
    if kind == "tagging" and not metrics.is_entity_scheme(names):
        scores = ("accuracy", "macro_f1")  # parts of speech, for instance
    return Files(
        "custom", tuple(text), names, scores, scores[0],
        kind=kind, files=files, label=label, validation_fraction=validation_fraction, split_seed=split_seed,
    )  # fmt: skip
