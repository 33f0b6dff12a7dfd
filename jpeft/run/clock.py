"""Seconds by kind of work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Adds up seconds by kind of work, with those spent compiling apart.

    Args:
      seconds: what was spent before, by kind.

    Attributes:
      seconds: the sums.
    """

    def __init__(self, seconds: Mapping[str, float] = {}):
        self.seconds = dict(seconds)
        self._compiled, self._start, self._before = _nothing, time.perf_counter(), 0.0
        self._shared_by = 1

    def start(self, compiled: Callable[[], float] | None = None, shared_by: int | None = None) -> None:
        """Begins a lap.

        Args:
          compiled: tells the seconds spent compiling so far; None for the function given before.
          shared_by: how many clocks count the same time, each its part; None for the number given before.
        """
        self._compiled = compiled or self._compiled
        self._shared_by = shared_by or self._shared_by
        self._start, self._before = time.perf_counter(), self._compiled()

    def lap(self, name: str) -> None:
        """Counts the time since the last lap as `name`, less what was spent compiling, which counts as "compile"."""
        elapsed, compiling = time.perf_counter() - self._start, self._compiled() - self._before
        self._add(name, (elapsed - compiling) / self._shared_by)
        self._add("compile", compiling / self._shared_by)
        self.start()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Counts the time inside the block as `name`."""
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _nothing() -> float:
    return 0.0
