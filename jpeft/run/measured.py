"""Fisher information within a run: with a bar, kept with what it was measured from, resumed after a stop.

fisher_0.safetensors            the result, with `about` as JSON in its metadata
fisher_0.safetensors.partial    a sum that was not complete when the run stopped; gone when it is
"""

import hashlib
import json
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data import batching
from jpeft.importance.fisher import Running, accumulate, mean
from jpeft.models.pretrained import fingerprint
from jpeft.report import plots
from jpeft.run.console import Console
from jpeft.run.measuring import lengths
from jpeft.run.seed import Seed
from jpeft.training import placement

__all__ = ["drawn", "information", "measure", "read"]

SAVE_SECONDS = 60.0  # between partial sums on disk


def measure(
    path: Path,
    about: Mapping[str, Any],
    console: Console,
    fn: Any,
    tree: Any,
    examples: Any,
    *rest: Any,
    **options: Any,
) -> Any:
    """`jpeft.fisher`, or what an earlier start of the same measurement found.

    Args:
      path: of the safetensors file that keeps the result.
      about: what it is measured from, JSON: model, data, examples, variant. A file with another `about` is replaced.
      console: shows the bar.
      fn: as for `jpeft.fisher`, and so are all others.
      tree: as for `jpeft.fisher`.
      examples: as for `jpeft.fisher`, grouped.
      *rest: as for `jpeft.fisher`.
      **options: as for `jpeft.fisher`.

    Returns:
      A pytree like `tree`.

    Raises:
      UserError: as `jpeft.fisher`.
    """
    partial = path.with_name(f"{path.name}.partial")
    names = [jax.tree_util.keystr(p, simple=True, separator=":") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    found = _read(path, about)
    if found is not None:
        return jax.tree.structure(tree).unflatten([found[0][name] for name in names])
    n = sum(len(jax.tree.leaves(group)[0]) for group in examples)
    begun, start = _read(partial, about), None
    if begun is not None:
        start = Running(begun[1], jax.tree.structure(tree).unflatten([begun[0][name] for name in names]))
    last, written = start, time.monotonic()
    done = 0 if start is None else start.done
    resumed = f", resuming at {done}" if done else ""
    with console.counting(f"  Fisher information over {n} examples{resumed}", n, done) as show:
        for running in accumulate(fn, tree, examples, *rest, start=start, grouped=True, **options):
            last = running
            show(running.done)
            due = time.monotonic() - written > SAVE_SECONDS and running.done < n
            # A sum that is not finite is an error that the next step reports, and nothing to resume from.
            if due and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(running.parts)):
                _write(partial, names, running.total, about, running.done)
                written = time.monotonic()
    assert last is not None
    information = mean(last)
    _write(path, names, information, about, n)
    partial.unlink(missing_ok=True)
    return information


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a result: {leaf's path joined by ":": array}, and what it was measured from.

    Raises:
      UserError: if it is not such a file, or was damaged.
    """
    arrays, metadata = files.read_tensors(path)
    try:
        about = json.loads(metadata.get("about", "null"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} does not hold Fisher information: {error}") from None
    if not isinstance(about, dict) or "done" not in about:
        raise UserError(f"{path} does not say what it was measured from")
    return arrays, about


def information(seed: Seed, name: str, fn: Any, tree: Any, n: int, *rest: Any, **options: Any) -> Any:
    """Fisher information over training examples of a seed, kept in its folder, with a picture.

    Args:
      seed: whose examples they are.
      name: of the file that keeps the result.
      fn: as for `jpeft.fisher`.
      tree: as for `jpeft.fisher`.
      n: examples, at most as many as there are.
      *rest: as for `jpeft.fisher`.
      **options: as for `jpeft.fisher`.

    Returns:
      A pytree like `tree`.

    Raises:
      UserError: if `labels` other than "empirical" are asked of a task with several answers a row; as `jpeft.fisher`.
    """
    kind, labels = seed.data.task.kind, options.get("labels", "empirical")
    if labels != "empirical" and kind in ("multilabel", "tagging"):
        raise UserError(f"labels {labels!r} are for one answer a row, not for {kind}: expected 'empirical'")
    examples, rows = drawn(seed, n)
    batches, order = batching.by_length(examples, lengths(seed, 4))
    about = {
        "model": seed.config.model,
        "fingerprint": fingerprint(seed.base.params),
        "leaves": fingerprint(tree),
        "task": seed.config.task,
        "seed": seed.seed,
        "num_examples": len(rows),
        "rows": _digest(examples),
        "labels": options.get("labels", "empirical"),
        "values": options.get("values", "square"),
    }
    key = jax.random.fold_in(seed.key, zlib.crc32(b"labels"))
    path, ids = seed.folder / name, rows[order].tolist()
    # Only the first process measures (`experiment`), on all devices that it has.
    options["mesh"] = placement.own_devices()
    found = measure(path, about, seed.console, fn, tree, batches, *rest, key=key, ids=ids, **options)
    title = f"Fisher information over {len(rows):,} examples\n{seed.config.task}, {seed.config.model}"
    plots.fisher_map(path.with_suffix(".png"), read(path)[0], title)
    return found


def _digest(examples: batching.Examples) -> str:
    """Of tokens and labels, so that other data under the same name are known as such."""
    arrays = (*examples.input_ids, *examples.token_type_ids, examples.labels)
    return hashlib.sha256(b"|".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def drawn(seed: Seed, n: int) -> tuple[batching.Examples, np.ndarray]:
    """At most n training examples of a seeded shuffle, and their row numbers."""
    return batching.sample(seed.data.train, min(n, seed.data.train.size), seed.seed)


def _write(path: Path, names: list[str], information: Any, about: Mapping[str, Any], done: int) -> None:
    flat = dict(zip(names, jax.tree.leaves(information), strict=True))
    files.write_leaves(path, flat, {"about": json.dumps({**about, "done": done})})


def _read(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int] | None:
    """The arrays of a file, and how many examples are in them; None if it is not there or of something else."""
    if not path.is_file():
        return None
    arrays, origin = read(path)
    done = origin.pop("done")
    return (arrays, done) if origin == json.loads(json.dumps(about)) else None
