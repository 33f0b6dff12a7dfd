"""Several processes, on one or several hosts, that train one run together.

All of them run the same program on the same data. The first owns the workdir and prints. The others work without a word
in scratch folders of their own, where they find what the first one chose and measured. What one of them cannot do stops
all of them. With a single process, all of this does nothing.
"""

import atexit
import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jpeft.core.errors import UserError, one_line

__all__ = [
    "any_says", "from_first", "in_all", "in_turn", "is_first", "join", "lost", "own_folder", "several", "shared",
]  # fmt: skip

T = TypeVar("T")

PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds
LINE = 1000  # bytes of an error that the others hear of
# How JAX's errors begin where another process is gone.
GONE = ("ABORTED:", "CANCELLED:", "DEADLINE_EXCEEDED:", "INTERNAL:", "UNAVAILABLE:", "UNKNOWN:")
APART = ("checkpoints", "model")  # folders that only the first process reads


def join(given: str) -> None:
    """Joins the other processes of a run; before anything else of JAX's is called.

    Args:
      given: "auto", where JAX detects the cluster (SLURM, a TPU pod, Open MPI, Kubernetes), or HOST:PORT,COUNT,INDEX:
        where the first process listens, how many there are, and which this one is.

    Raises:
      UserError: if there is no cluster, or `given` is neither.
    """
    address, *numbers = given.split(",")
    explicit = len(numbers) == 2 and all(x.isdecimal() for x in numbers) and ":" in address
    if given != "auto" and not (explicit and int(numbers[1]) < int(numbers[0])):
        raise UserError(
            f"--distributed {given!r}: expected auto, or HOST:PORT,COUNT,INDEX, such as 10.0.0.1:1234,2,0 on the first "
            "of two hosts and 10.0.0.1:1234,2,1 on the second"
        )
    # It would take SIGTERM for itself, and a run that is told to stop before it trains would go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if explicit:
            jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]), cluster_detection_method="deactivate")
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        told = "; without a cluster that JAX knows, give HOST:PORT,COUNT,INDEX" if given == "auto" else ""
        raise UserError(f"--distributed {given}: {one_line(error):.200}{told}") from None


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that owns the workdir."""
    return jax.process_index() == 0


@contextmanager
def own_folder(workdir: Path) -> Iterator[Path]:
    """The workdir in the first process; a scratch folder, deleted in the end, in any other."""
    if is_first():
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="jpeft-") as scratch:
        yield Path(scratch)


@contextmanager
def lost() -> Iterator[None]:
    """Makes one line of what JAX raises where another process is gone, and does not wait for it at exit.

    Raises:
      UserError: that line.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # it makes some of the former the latter
        line = one_line(error)
        if not several() or not line.startswith(GONE):
            raise
        atexit.register(os._exit, 2)  # before what JAX registered, which would wait for all processes
        raise UserError(f"lost another process of this run ({line:.150}); what was saved before is intact") from None


def in_all(work: Callable[[], T]) -> T:
    """Calls `work` in every process.

    Raises:
      UserError: in all of them, if it raises one in any; that of the first of these.
    """
    if not several():
        return work()
    result, error = None, None
    try:
        result = work()
    except UserError as caught:
        error = caught
    _wait()
    line = str(error or "").encode()[:LINE]
    lines = multihost_utils.process_allgather(np.frombuffer(line.ljust(LINE, b"\0"), np.uint8))
    for number, told in enumerate(bytes(line).rstrip(b"\0").decode(errors="replace") for line in lines):
        if told:
            raise (error if error is not None and number == jax.process_index() else UserError(told)) from None
    return result  # type: ignore[return-value]


_waits = itertools.count()


def _wait() -> None:
    """Until all processes are here, however long one of them works; arrays are sent with little patience."""
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=f"jpeft_{next(_waits)}", timeout_ms=PATIENCE)


def in_turn(folder: Path, work: Callable[[], T]) -> T:
    """Calls `work` in the first process, then in the others, in whose `folder` the files of the first now are.

    Raises:
      UserError: in all of them, if it raises one in any.
    """
    if not several():
        return work()
    found = in_all(lambda: work() if is_first() else None)
    _copy(folder)
    rest = in_all(lambda: None if is_first() else work())
    return found if is_first() else rest  # type: ignore[return-value]


def _copy(folder: Path) -> None:
    """Writes the files of the first process' folder into that of every other."""
    packed = io.BytesIO()
    if is_first():
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
                name = path.relative_to(folder)
                if path.is_file() and not set(name.parts) & set(APART):
                    tar.add(path, name.as_posix())
    sent = _bytes(packed.getvalue())
    if not is_first():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(sent)) as tar:
            tar.extractall(folder, filter="data")


def from_first(value: Any) -> Any:
    """The value that the first process passes, in all of them. It must be JSON."""
    return json.loads(_bytes(json.dumps(value).encode())) if several() else value


def _bytes(given: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(given) if is_first() else 0)))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes: each is a program to compile
    if is_first():
        padded[:size] = np.frombuffer(given, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def shared(tree: Any) -> Any:
    """The arrays that the first process passes, in all of them; the others pass some of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def any_says(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether any process passes True. All must call it at the same point."""
    if not several():
        return flags
    return tuple(np.any(multihost_utils.process_allgather(np.array(flags)), axis=0).tolist())
