"""Orbax checkpoints of everything but the frozen base; a run resumes from the latest."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from jpeft.core.errors import UserError
from jpeft.training.step import State

__all__ = ["Progress", "Restored", "restore", "save"]


class Progress(NamedTuple):
    """What a resumed run needs besides the arrays, JSON throughout.

    Attributes:
      history: one row for each finished epoch, as in `metrics.jsonl`.
      loss_sum: sum of the batch losses of the epoch under way.
      seconds: seconds spent by kind of work.
    """

    history: list[dict[str, Any]]
    loss_sum: float
    seconds: dict[str, float]


class Restored(NamedTuple):
    """A state and the progress that was saved with it."""

    state: State
    progress: Progress


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: Path, state: State, progress: Progress) -> None:
    """Writes `folder/<step>` atomically, then deletes the one before. A step that is there already is left as it is."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        step = int(state.step)
        if step not in manager.all_steps():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress._asdict())
            )
            manager.save(step, args=items, force=True)


def restore(folder: Path, like: State) -> Restored | None:
    """Reads the newest checkpoint.

    Args:
      folder: where `save` wrote.
      like: a state of the same structure, shapes and dtypes; its values are not read.

    Returns:
      The state and its progress, or None if there is no checkpoint yet.

    Raises:
      UserError: if what is there is not of this structure, or cannot be read.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        try:
            read = manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {folder / str(step)} cannot be resumed ({reason}): delete it") from error
    return Restored(jax.tree.map(jax.numpy.asarray, read["state"]), Progress(**read["progress"]))
