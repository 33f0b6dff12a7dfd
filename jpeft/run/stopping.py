"""SIGTERM, by which schedulers take a machine away: what is under way is saved, and the program exits with 0."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "deferred", "raised"]

AGAIN = 1.0  # seconds


class Stopped(BaseException):
    """The process was asked to stop; its message is for the user. No `except Exception` holds it up."""


@contextmanager
def raised() -> Iterator[None]:
    """Within it, SIGTERM raises `Stopped` at once.

    Python drops what is raised in a callback of the garbage collector. So the signal comes again, until it is heard.
    """
    again: list[threading.Timer] = []

    def stop(*_: Any) -> None:
        if isinstance(sys.exception(), Stopped):  # it is on its way out
            return
        again.append(threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM)))
        again[-1].daemon = True
        again[-1].start()
        raise Stopped("stopped before training; what was measured is kept")

    with _handled(stop):
        try:
            yield
        finally:
            for timer in again:
                timer.cancel()


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM is only noted: the function it gives says whether it came."""
    came = threading.Event()
    with _handled(lambda *_: came.set()):
        yield came.is_set


@contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
