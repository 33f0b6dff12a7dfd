"""Lines and bars on the terminal; in a log file, where bars would be noise, one line per epoch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jpeft.training.loop import Event

__all__ = ["Bar", "Console"]


class Bar:
    """A training's bar: mean loss of the epoch so far, last score, examples a second, time left.

    Of several runs that train together, the means, and each has its lines.
    """

    def __init__(self, progress: Progress, task: TaskID, console: "Console", names: Sequence[str]):
        self._progress, self._task, self._console, self._names = progress, task, console, names or ("",)
        self._score = ""

    def show(self, events: Sequence[Event], primary: str, batch_size: int) -> None:
        """Moves on by the steps of an event of each run, or prints the lines of a finished epoch."""
        rows = [event.row for event in events if event.row is not None]
        if not rows:
            self._advance(events, batch_size)
            return
        self._score = f"{primary} {fmean(row[primary] for row in rows):.3f}  "
        for name, row in zip(self._names, rows, strict=True):
            self._epoch(name, row)

    def _advance(self, events: Sequence[Event], batch_size: int) -> None:
        event, loss = events[0], fmean(event.loss_sum for event in events)
        done = event.step - (event.history[-1]["step"] if event.history else 0)
        # Of the last steps, so that compiling does not count for long.
        speed = len(events) * batch_size * (self._progress.tasks[self._task].speed or 0.0)
        status = f"loss {loss / done:.3f}  {self._score}{speed:.0f} examples/s"
        self._progress.update(self._task, advance=len(event.losses), description=f"epoch {event.epoch}", status=status)

    def _epoch(self, name: str, row: dict[str, Any]) -> None:
        scores = "  ".join(
            f"{name} {value:.4f}" for name, value in row.items() if name not in ("epoch", "step", "train_loss")
        )
        of = f"{name}  " if name else ""
        self._console.say(
            f"  {of}epoch {row['epoch']:>2}  step {row['step']:>6,}  loss {row['train_loss']:.4f}  {scores}"
        )


class Console:
    """Where a run prints.

    Args:
      quiet: print nothing at all.

    Attributes:
      warnings: all that were printed, or would have been.
    """

    def __init__(self, quiet: bool = False):
        self.warnings: list[str] = []
        self._rich = rich.console.Console(quiet=quiet, highlight=False, soft_wrap=True)

    @property
    def _fixed(self) -> bool:
        """Whether this is a notebook without widgets, where nothing that was shown can be drawn anew."""
        return self._rich.is_jupyter and find_spec("ipywidgets") is None

    def say(self, text: str = "") -> None:
        """Prints a line as it is."""
        self._rich.print(text, markup=False)

    def title(self, text: str) -> None:
        """Prints a line that begins a new part."""
        self._rich.print(text, style="bold", markup=False)

    def warn(self, text: str) -> None:
        """Prints a warning, and keeps it for the report."""
        self.warnings.append(text)
        self._rich.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def training(self, total: int, done: int, names: Sequence[str] = ()) -> Iterator[Bar]:
        """A bar over `total` steps of which `done` are made; `names` tells apart runs that train together."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        shown = self._rich.is_terminal and not self._fixed
        with Progress(*columns, console=self._rich, transient=True, disable=not shown) as progress:
            task = progress.add_task("starting", total=total, completed=done, status="compiling")
            yield Bar(progress, task, self, names)

    @contextmanager
    def counting(self, text: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar over `total` examples, None if that is not known; the function it gives says how many are done."""
        self.say(text)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        shown = self._rich.is_terminal and not self._fixed
        with Progress(*columns, console=self._rich, transient=True, disable=not shown) as progress:
            task = progress.add_task("examples", total=total, completed=done)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner beside a text while work without steps is under way."""
        with nullcontext() if self._fixed else self._rich.status(text):
            yield
