"""Locks among the workers of a search. They are the operating system's, and end with the process however it ends."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["alone", "hold"]

LOCK, CLAIM = ".search.lock", ".claim"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other worker is in here."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a", encoding="utf-8") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def hold(folder: Path) -> TextIO | None:
    """Holds a folder of runs, until what it returns is closed; None if another worker does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / CLAIM, "a", encoding="utf-8")  # noqa: SIM115, whoever called closes it
    if not _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        file.close()
        return None
    return file


def _flock(file: TextIO, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where there can be one worker only, as the run itself warns
        return True
    return True
