"""Lines and bars on the terminal; in a log file, where bars would be noise, one line per epoch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jpeft.training.loop import Event

__all__ = ["Bar", "Console"]


class Bar:
    """One training run's bar: mean loss of the epoch so far, last score, examples a second, time left."""

    def __init__(self, progress: Progress, task: TaskID, console: "Console"):
        self._progress, self._task, self._console = progress, task, console
        self._score = ""

    def show(self, event: Event, primary: str, batch_size: int) -> None:
        """Moves on by the steps of an event, or prints the line of a finished epoch."""
        if event.row is None:
            self._advance(event, batch_size)
        else:
            self._epoch(event.row, primary)

    def _advance(self, event: Event, batch_size: int) -> None:
        done = event.step - (event.history[-1]["step"] if event.history else 0)
        # Of the last steps, so that compiling does not count for long.
        speed = self._progress.tasks[self._task].speed or 0.0
        status = f"loss {event.loss_sum / done:.3f}  {self._score}{batch_size * speed:.0f} examples/s"
        self._progress.update(self._task, advance=len(event.losses), description=f"epoch {event.epoch}", status=status)

    def _epoch(self, row: dict[str, Any], primary: str) -> None:
        self._score = f"{primary} {row[primary]:.3f}  "
        scores = "  ".join(
            f"{name} {value:.4f}" for name, value in row.items() if name not in ("epoch", "step", "train_loss")
        )
        self._console.say(f"  epoch {row['epoch']:>2}  step {row['step']:>6,}  loss {row['train_loss']:.4f}  {scores}")


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
    def training(self, total: int, done: int) -> Iterator[Bar]:
        """A bar over `total` steps of which `done` are made."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        shown = self._rich.is_terminal
        with Progress(*columns, console=self._rich, transient=True, disable=not shown) as progress:
            task = progress.add_task("starting", total=total, completed=done, status="compiling")
            yield Bar(progress, task, self)

    @contextmanager
    def counting(self, text: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A bar over `total` examples; the function it gives says how many are done."""
        self.say(text)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        shown = self._rich.is_terminal
        with Progress(*columns, console=self._rich, transient=True, disable=not shown) as progress:
            task = progress.add_task("examples", total=total, completed=done)
            yield lambda done: progress.update(task, completed=done)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner beside a text while work without steps is under way."""
        with self._rich.status(text):
            yield
