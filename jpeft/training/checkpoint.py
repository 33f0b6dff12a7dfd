"""Orbax checkpoints of everything but the frozen base; a run resumes from the latest that is as it was written.

A checkpoint carries a hash of its contents, and a list of its files with theirs lies beside it. Two are kept, so that
the one before is there when the latest is damaged.
"""

import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.files import file_hash, read_record, write_record
from jpeft.core.tree import num_bytes
from jpeft.training.step import State

__all__ = ["Progress", "Restored", "in_background", "restore", "save", "snapshot"]

SPARE = 500_000  # bytes that a checkpoint takes besides its arrays, and some more
KIND = "list of a checkpoint's files"
HASH = "sha256"  # beside the progress


class Progress(NamedTuple):
    """What a resumed run needs besides the arrays, JSON throughout.

    Attributes:
      history: one row for each finished epoch, as in `metrics.jsonl`.
      loss_sum: sum of the batch losses of the epoch under way.
      seconds: seconds spent by kind of work.
      owner: tells the checkpoints of one run from those of another.
      layouts: of the batches, [rows, length] of each part; None in one of an earlier version.
    """

    history: list[dict[str, Any]]
    loss_sum: float
    seconds: dict[str, float]
    owner: str = ""
    layouts: list[list[list[int]]] | None = None


class Restored(NamedTuple):
    """A state and the progress that was saved with it."""

    state: State
    progress: Progress


def snapshot(state: State) -> State:
    """The state in memory of the host, which the next step does not overwrite as it does the device's."""
    return jax.tree.map(np.array, jax.device_get(state))


@contextmanager
def in_background() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Within it, the function it gives has work done in a thread, while training goes on.

    One piece at a time: a call waits for the piece before, and so does the end of the context. Both raise what that
    piece raised, so that nothing is taken for saved that is not.
    """
    pending: Future[None] | None = None

    def wait() -> None:
        nonlocal pending
        done, pending = pending, None
        if done is not None:
            done.result()

    def submit(work: Callable[[], None]) -> None:
        nonlocal pending
        wait()
        pending = pool.submit(work)

    with ThreadPoolExecutor(1, "checkpoint") as pool:
        try:
            yield submit
        finally:
            wait()


def _alone() -> Any:
    """Of several processes, one writes, and the others do not wait for it."""
    import orbax.checkpoint as ocp

    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")


def _manager(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        create=False,
        multiprocessing_options=_alone(),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(folder: Path, state: State, progress: Progress) -> None:
    """Writes `folder/<step>` atomically, then deletes all but the one before. A step that is there is left as it is.

    Raises:
      UserError: if it cannot be written.
    """
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    # Asked first: where a disk runs full under them, Orbax's threads print tracebacks of their own.
    needed, free = num_bytes(state) + SPARE, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"cannot write a checkpoint to {folder}: {free / 1e6:.1f} MB are free, {needed / 1e6:.1f} MB are needed"
        )
    with _manager(folder) as manager:
        step = int(state.step)
        if step not in manager.all_steps():
            about = {**progress._asdict(), HASH: _hash(state, progress._asdict())}
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(jax.device_get(state)), progress=ocp.args.JsonSave(about)
            )
            try:
                manager.save(step, args=items, force=True)
            except Exception as error:  # of the file system, in whatever its writers make of it
                raise UserError(f"cannot write a checkpoint to {folder}: {_first_line(error)}") from error
            write_record(_list(folder, step), KIND, _files(folder / str(step)))
            kept = {_list(folder, each) for each in manager.all_steps()}
            for other in set(folder.glob(".*.json")) - kept:
                other.unlink()


def restore(
    folder: Path, like: State, warn: Callable[[str], None] = lambda text: None, owner: str | None = None
) -> Restored | None:
    """Reads the newest checkpoint, or the one before if that one is damaged.

    Args:
      folder: where `save` wrote.
      like: a state of the same structure, shapes and dtypes; its values are not read.
      warn: called with one line about each checkpoint that is passed over.
      owner: whose checkpoints; those of another run are passed over. None accepts those of any run.

    Returns:
      The state and its progress, or None if there is no checkpoint yet.

    Raises:
      UserError: if there are checkpoints, but none of this structure that can be read and is as it was written, or
        something else than files.
    """
    # Not by Orbax's manager, which looks into all of them and would wait for what comes out of a pipe.
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)
    reason: Exception | None = None
    for step in steps:
        try:
            _check_files(folder, step)
            found = _read(folder / str(step), like)
            if owner is not None and found.progress.owner != owner:
                raise _Damaged("it is of another run or seed")
        except _Damaged as error:
            warn(f"checkpoint {folder / str(step)} cannot be resumed: {error}")
            reason = error
        else:
            # Or the run, when it gets to a damaged one again, would find the step saved, and Orbax would read it.
            for other in steps:
                if other > step or (other < step and not _is_whole(folder, other)):
                    _remove(folder / str(other))
            return found
    if reason is None:
        return None
    raise UserError(f"no checkpoint in {folder} can be resumed ({reason}): delete the folder to start again")


class _Damaged(Exception):
    """A checkpoint that cannot be read, with the reason in one line."""


def _list(folder: Path, step: int) -> Path:
    return folder / f".{step}.json"


def _files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in paths}


def _strange(folder: Path) -> str:
    """What in a checkpoint is neither a file nor a folder, such as a pipe or a link to nowhere; "" if nothing is."""
    odd = (path for path in (folder, *folder.rglob("*")) if not path.is_file() and not path.is_dir())
    return next((f"{path} is neither a file nor a folder" for path in odd), "")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_files(folder: Path, step: int) -> None:
    """Finds damaged files before Orbax does, whose threads print tracebacks of their own.

    A run that was killed before it wrote the list left none; then the hash of the contents has to do.
    """
    if told := _strange(folder / str(step)):
        raise _Damaged(told)
    try:
        written = read_record(_list(folder, step), KIND) if _list(folder, step).is_file() else None
    except UserError as error:
        raise _Damaged(str(error)) from None
    if written is not None and written != _files(folder / str(step)):
        raise _Damaged("its files were changed or damaged after they were written")


def _is_whole(folder: Path, step: int) -> bool:
    try:
        _check_files(folder, step)
    except _Damaged:
        return False
    return True


def _read(path: Path, like: State) -> Restored:
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_alone()) as reader:
            read = reader.restore(path.absolute(), args=args)
        state = jax.tree.map(jax.numpy.asarray, read["state"])
        about = dict(read["progress"])
        written = about.pop(HASH)
        progress = Progress(**about)
    # Whatever its readers raise, of arrays, of JSON, of missing files.
    except Exception as error:
        raise _Damaged(_first_line(error)) from error
    for where, told in jax.tree_util.tree_leaves_with_path(jax.tree.map(_unlike, like, state)):
        if told:
            raise _Damaged(f"{jax.tree_util.keystr(where)} {told}")
    if written != _hash(state, about):
        raise _Damaged("its contents do not match its hash")
    return Restored(state, progress)


def _unlike(wanted: Any, found: Any) -> str:
    """In what an array is not like the one that is wanted, which Orbax does not ask."""
    now, then = (f"{x.dtype.name}{list(x.shape)}" for x in (wanted, found))
    return "" if now == then else f"is {then}, expected {now}"


def _first_line(error: Exception) -> str:
    return textwrap.shorten((str(error).splitlines() or [type(error).__name__])[0], 200)


def _hash(state: State, about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(x, order="C")
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
