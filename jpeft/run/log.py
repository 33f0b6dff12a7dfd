"""The log of a run: `metrics.jsonl`, one line for each epoch and for some steps of each seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.run.seed import Seed
from jpeft.training.loop import Event

__all__ = ["LOG", "Log", "mend"]

LOG = "metrics.jsonl"
LOG_EVERY = 50  # steps


def mend(workdir: Path, seed: int, history: Sequence[dict[str, Any]], reached: int, seeds: Sequence[int]) -> bool:
    """Drops what `metrics.jsonl` has of a seed twice, beyond a step or against its history, and adds what it lacks.

    Args:
      workdir: of the run.
      seed: whose lines are mended.
      history: the rows of its epochs.
      reached: the step that it is at.
      seeds: all of the run; lines of others are dropped.

    Returns:
      Whether it lacked an epoch, or had another one in its place.

    Raises:
      UserError: if something else than a file is in its place.
    """
    path = workdir / LOG
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: delete it")
    found: list[dict[str, Any]] = []
    epochs = [{"seed": seed, **each} for each in history]

    def keep(row: Any) -> bool:
        of_run = row["step"] <= reached and ("train_loss" not in row or row in epochs)
        kept = row["seed"] in seeds and (row["seed"] != seed or (of_run and row not in found))
        if kept:
            found.append(row)
        return kept

    files.keep_lines(path, keep)
    lacking = [row for row in epochs if row not in found]
    if lacking:  # each in its place
        own = sorted([*(row for row in found if row["seed"] == seed), *lacking], key=_place)
        rows = [*(row for row in found if row["seed"] != seed), *own]
        files.write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return bool(lacking)


def _place(row: dict[str, Any]) -> tuple[int, bool]:
    """Of a line among those of its seed: the row of an epoch comes after that of its last step."""
    return row["step"], "train_loss" in row


class Log:
    """The lines of one seed in `metrics.jsonl`; what an interrupted run wrote beyond its checkpoint is dropped.

    With `config.train.tensorboard`, the same numbers go to `seed_<n>/tensorboard`.
    """

    def __init__(self, seed: Seed, reached: int, history: Sequence[dict[str, Any]]):
        self._path, self._seed, self._writer = seed.workdir / LOG, seed.seed, None
        if mend(seed.workdir, seed.seed, history, reached, seed.config.seeds):
            seed.console.warn(f"{self._path} lacked epochs of seed {seed.seed}, which were added")
        if seed.config.train.tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(seed.folder / "tensorboard"), purge_step=reached + 1)

    def write(self, event: Event) -> None:
        """Appends the row of an epoch, and of every `LOG_EVERY`th step."""
        first = event.step - len(event.losses) + 1
        for at, loss, norm in zip(range(first, event.step + 1), event.losses, event.grad_norms, strict=True):
            if at % LOG_EVERY == 0:
                self._append({"epoch": event.epoch, "step": at, "loss": loss, "grad_norm": norm})
        if event.row is not None:
            self._append(event.row)

    def _append(self, row: dict[str, Any]) -> None:
        files.append_json(self._path, {"seed": self._seed, **row})
        if self._writer is not None:
            for name in row.keys() - {"epoch", "step"}:
                self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()
