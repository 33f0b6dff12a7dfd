"""The names of classes in files of the user's own, refused where two of them would be one to a reader."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.data.rows import INSTEAD, between_spaces, is_written_list, rows

__all__ = ["alike", "classes", "of_row"]

MAX_CLASSES = 1000  # more than these are a column of the wrong kind
EXACT = Context(prec=200)  # numbers of as many digits as a name can have are not rounded
MISSING = "nan"  # as other programs write it; "none" and "null" may well be classes


def classes(file: Path, label: str, kind: str, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The class names: those given, or those that occur, in order: numbers by value, names by the alphabet.

    Args:
      file: with the training rows.
      label: the column with the class; of multilabel or tagging, with all of a row.
      kind: of answer.
      given: from the config.

    Raises:
      UserError: if there are fewer than two, or two that a reader would take for one.
    """
    if given is not None:
        if len(set(given)) < max(2, len(given)):
            raise UserError(f"config.data.labels must be at least two distinct names, got {tuple(given)}")
        return tuple(map(str, given))
    counts = Counter(
        name for number, row in enumerate(rows(file), start=1) for name in of_row(row, label, kind, file, number) or ()
    )
    names = list(counts)
    if all(_is_number(name) for name in names):
        fractions = [name for name in names if not float(name).is_integer()]
        if fractions:
            raise UserError(
                f"{file}: label {fractions[0]} is not a class: set config.data.kind=regression if labels are values"
            )
        names.sort(key=Decimal)
    else:
        names.sort()
    read = Counter(map(_read_as, names))
    if read and read.most_common(1)[0][1] > 1:
        twins = [name for name in names if _read_as(name) == read.most_common(1)[0][0]]
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


def of_row(row: Any, label: str, kind: str, file: Path, number: int, hidden: bool = False) -> list[str] | None:
    """The names of the classes of a row; None if they are hidden.

    One name; of multilabel, a list, or text with a name between semicolons, either of which may be empty; of tagging, a
    list, or text with a name between spaces.

    Raises:
      UserError: if the row has no such column, or something else in it.
    """
    where = f"{file}, row {number}"
    if label not in row and not hidden:
        raise UserError(f"{where}: no column {label!r}; {nearest(label, row)}")
    value = row.get(label)
    if kind in ("multilabel", "tagging") and isinstance(value, str) and is_written_list(value):
        between = "';'" if kind == "multilabel" else "spaces"
        raise UserError(f"{where}: label {value!r:.60} is a list written as text: {INSTEAD.format(between)}")
    if kind == "multilabel" and value is not None:
        several = [part.strip() for part in value.split(";")] if isinstance(value, str) else value
        if not isinstance(several, list):
            raise UserError(f"{where}: label {value!r:.60} is neither a list of names nor text with names between ';'")
        names = [_name(each, where, ";") for each in several if each != ""]
        if len(set(names)) < len(names):
            raise UserError(f"{where}: label {value!r:.60} has a name twice")
        return names
    if value is None or value == "" or value == []:
        if hidden:
            return None
        raise UserError(f"{where}: the label is empty")
    if kind == "tagging":
        several = between_spaces(value) if isinstance(value, str) else value
        if not isinstance(several, list):
            raise UserError(f"{where}: label {value!r:.60} is neither a list of tags nor text with tags between spaces")
        return [_name(each, where, " ") for each in several]
    return [_name(value, where)]


def _name(value: Any, where: str, without: str = "") -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as JSON and most CSV files have it
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not np.isfinite(value)):
        raise UserError(f"{where}: label {value!r:.60} is neither a name nor a number")
    text = str(value)
    if not text.strip() or len(text) > 200 or not text.isprintable() or (without and without in text):
        raise UserError(f"{where}: label {text!r:.60} cannot be the name of a class")
    return text


def alike(first: str, second: str) -> bool:
    """Whether a reader takes two names for one."""
    return _read_as(first) == _read_as(second)


def _read_as(name: str) -> str:
    """What a reader takes a class name for: numbers by value, words whatever their case, spaces or encoding."""
    text = unicodedata.normalize("NFC", name).strip().casefold()
    return str(Decimal(text).normalize(EXACT)) if _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text)).item()
    except ValueError:
        return False
