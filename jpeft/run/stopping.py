"""SIGTERM, by which schedulers take a machine away: what is under way is saved, and the program exits with 0."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopped", "deferred", "raised"]


class Stopped(BaseException):
    """The process was asked to stop; its message is for the user. No `except Exception` holds it up."""


@contextmanager
def raised() -> Iterator[None]:
    """Within it, SIGTERM raises `Stopped` at once."""

    def stop(*_: Any) -> None:
        raise Stopped("stopped before training; what was measured is kept")

    with _handled(stop):
        yield


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
