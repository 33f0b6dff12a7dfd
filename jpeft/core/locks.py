"""Locks of open files. They are the operating system's, and end with the process however it ends."""

import fcntl
from typing import TextIO

__all__ = ["take"]


def take(file: TextIO, wait: bool = False) -> bool:
    """Locks an open file until it is closed; False if another process holds it.

    Args:
      file: open for writing.
      wait: until nobody else holds it.

    Raises:
      OSError: if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
