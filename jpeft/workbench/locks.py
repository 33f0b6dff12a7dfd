"""Locks among the workers of a search."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from jpeft.core import locks

__all__ = ["alone", "hold"]

LOCK, CLAIM = ".search.lock", ".claim"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other worker is in here."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a", encoding="utf-8") as file:
        _take(file, wait=True)
        yield


def hold(folder: Path) -> TextIO | None:
    """Holds a folder of runs, until what it returns is closed; None if another worker does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / CLAIM, "a", encoding="utf-8")  # noqa: SIM115, whoever called closes it
    if not _take(file):
        file.close()
        return None
    return file


def _take(file: TextIO, wait: bool = False) -> bool:
    try:
        return locks.take(file, wait)
    except OSError:  # a file system without locks, where there can be one worker only, as the run itself warns
        return True
