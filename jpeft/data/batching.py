"""From examples to batches: padded to a few lengths, in an order that is a pure function of seed and epoch."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.data.padding import Layout, padded_lengths, tops

__all__ = [
    "Batch", "Examples", "Hidden", "by_length", "drawn", "eval_batches", "filled", "num_batches", "sample", "take",
    "together", "train_batches",
]  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """What enters a layer, where all below it is computed once (`jpeft.training.below`).

    Attributes:
      states: of a batch, [b, t, d]; of `Examples`, [t, d] for every row. t is 1 where the first token is all that is
        needed.
      layer: which layer; the number of layers, if it is the head.
    """

    states: Any
    layer: int = dataclasses.field(metadata={"static": True})

    def width(self, length: int) -> int:
        """The number of tokens in a batch of this length, of rows of which these are the states."""
        return 1 if len(self.states[0]) == 1 else length


class Batch(NamedTuple):
    """One padded batch of b rows and t tokens, NumPy arrays until a jitted function traces them.

    Attributes:
      input_ids: [b, t] int32.
      attention_mask: [b, t] int32, 0 for padding.
      token_type_ids: [b, t] int32.
      labels: [b, ...], of what shape and type `jpeft.data.kinds` says.
      weights: [b] float32; 0 for a row that only fills up the last batch, to keep its shape.
      hidden: what the encoder begins with in the place of the tokens; None where it begins with these.
    """

    input_ids: Any
    attention_mask: Any
    token_type_ids: Any
    labels: Any
    weights: Any
    hidden: Hidden | None = None


class Examples(NamedTuple):
    """Tokenised rows of different lengths.

    Attributes:
      input_ids: one int32 array a row.
      token_type_ids: the same lengths.
      labels: [size, ...], of what shape and type `jpeft.data.kinds` says.
      pad_id: the token that padding consists of.
      unlabelled: the label of tokens that have none, where labels are by token, [size, t]; None where they are by row.
      hidden: see `Batch`; [t, d] for every row.
    """

    input_ids: tuple[np.ndarray, ...]
    token_type_ids: tuple[np.ndarray, ...]
    labels: np.ndarray
    pad_id: int = 0
    unlabelled: int | None = None
    hidden: Hidden | None = None

    @property
    def size(self) -> int:
        """The number of rows."""
        return len(self.input_ids)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of every row."""
        return np.fromiter(map(len, self.input_ids), np.int64, self.size)


def num_batches(size: int, batch_size: int) -> int:
    """Returns the number of batches of an epoch; the last one may be partial."""
    return math.ceil(size / batch_size)


def train_batches(
    examples: Examples,
    layouts: Sequence[Layout],
    seed: int,
    epoch: int,
    start: int = 0,
    multiple: int = 1,
    grouped: bool = False,
) -> Iterator[tuple[Batch, ...]]:
    """Yields batches that hold every row once, at random, in an order that depends on seed and epoch alone.

    How many rows of which padded length a batch has depends on the epoch alone; which rows these are, on the seed, too.
    So the seeds of a run have batches of one layout at every step, and can train together.

    Args:
      examples: the rows.
      layouts: from `layouts`, for these rows.
      seed: of the run.
      epoch: any number that tells the epochs of a run apart; `fit` counts from 1.
      start: skips this many batches, at no cost, to resume in the middle of an epoch.
      multiple: the rows of each part are filled up to a multiple of it, for as many devices.
      grouped: rows of one padded length meet in a batch, and which of them do is random.

    Yields:
      The parts of a batch, in the first layout that holds it. What the last batch lacks is filled with copies of its
      shortest row, of weight 0.

    Raises:
      ValueError: if no layout holds a batch.
    """
    lengths, batch_size = examples.lengths, sum(part.rows for part in layouts[0])
    order = np.random.default_rng((seed, epoch)).permutation(examples.size)
    kinds = np.searchsorted(padded_lengths(layouts), lengths)
    by_kind = order[np.argsort(kinds[order], kind="stable")]  # by kind, and within a kind at random
    shared = np.random.default_rng(epoch)
    if grouped:
        batches = _cut(by_kind, batch_size)
        batches = [batches[i] for i in shared.permutation(len(batches))]
    else:
        batches = _cut(by_kind[shared.permutation(examples.size)], batch_size)
    for rows in batches[start:]:
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        lacks = batch_size - len(rows)
        needed = np.concatenate([np.full(lacks, lengths[rows[0]]), lengths[rows]])
        layout = next((layout for layout in layouts if (needed <= tops(layout)).all()), None)
        if layout is None:
            raise ValueError(f"a batch with a row of {needed[-1]} tokens fits no layout of {tuple(layouts)}")
        ends = np.cumsum([0, *(part.rows for part in layout)]) - lacks
        yield tuple(
            _collate(examples, rows[max(0, i) : max(0, j)], filled(n, multiple), (length,), rows[0])
            for i, j, (n, length) in zip(ends[:-1], ends[1:], layout, strict=True)
        )


def filled(rows: int, multiple: int) -> int:
    """Returns the least multiple that holds so many rows."""
    return math.ceil(rows / multiple) * multiple


def eval_batches(examples: Examples, batch_size: int, buckets: Sequence[int]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields every row once, sorted by length, so that there is hardly any padding.

    Args:
      examples: the rows.
      batch_size: rows of every batch. What the last one lacks is filled with copies of weight 0.
      buckets: padded lengths; a batch has the smallest that holds its longest row.

    Yields:
      A batch and which rows it holds: the first `len(indices)` of the batch, the others have weight 0.

    Raises:
      ValueError: if a row is longer than every bucket.
    """
    for rows in _cut(np.argsort(examples.lengths, kind="stable"), batch_size):
        yield _collate(examples, rows, batch_size, buckets), rows


def by_length(examples: Examples, buckets: Sequence[int]) -> tuple[list[Batch], np.ndarray]:
    """All rows, in one batch for each bucket that is the smallest to hold some of them.

    Args:
      examples: the rows.
      buckets: padded lengths, ascending.

    Returns:
      The batches, and the indices of their rows one after the other.

    Raises:
      ValueError: if a row is longer than every bucket.
    """
    of = np.searchsorted(buckets, examples.lengths)
    groups = [np.flatnonzero(of == i) for i in np.unique(of)]
    return [_collate(examples, rows, len(rows), buckets) for rows in groups], np.concatenate(groups)


def together(examples: Examples, buckets: Sequence[int]) -> Batch:
    """All rows in one batch, in their order.

    Args:
      examples: the rows, at least one.
      buckets: padded lengths.

    Raises:
      ValueError: if a row is longer than every bucket.
    """
    return _collate(examples, np.arange(examples.size), examples.size, buckets)


def take(examples: Examples, indices: np.ndarray | Sequence[int]) -> Examples:
    """Returns the rows with these indices, in their order."""
    indices = np.asarray(indices, np.int64)
    return examples._replace(
        input_ids=tuple(examples.input_ids[i] for i in indices),
        token_type_ids=tuple(examples.token_type_ids[i] for i in indices),
        labels=examples.labels[indices],
        hidden=None if (own := examples.hidden) is None else Hidden(tuple(own.states[i] for i in indices), own.layer),
    )


def sample(examples: Examples, n: int, seed: int) -> tuple[Examples, np.ndarray]:
    """Draws rows without replacement.

    Args:
      examples: to draw from.
      n: how many; all of them if there are fewer.
      seed: of the shuffle whose first n are taken, so that a smaller sample is part of a larger one.

    Returns:
      The rows and their indices, in the order of the shuffle.
    """
    indices = drawn(examples.size, n, seed)
    return take(examples, indices), indices


def drawn(size: int, n: int, seed: int) -> np.ndarray:
    """The numbers of n of `size` rows, drawn as by `sample`; all of them if there are fewer."""
    return np.random.default_rng(seed).permutation(size)[:n]


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _collate(
    examples: Examples, rows: np.ndarray, batch_size: int, buckets: Sequence[int], filler: int | None = None
) -> Batch:
    # A copy of a real row fills up, not an empty one: attention over nothing and the like must not arise.
    all_rows = np.concatenate([rows, np.full(batch_size - len(rows), rows[0] if filler is None else filler)])
    longest = max(len(examples.input_ids[i]) for i in all_rows)
    length = min((b for b in buckets if b >= longest), default=0)
    if not length:
        raise ValueError(f"a row of {longest} tokens fits no bucket of {tuple(buckets)}")
    ids = np.full((batch_size, length), examples.pad_id, np.int32)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for r, i in enumerate(all_rows):  # at batches of 16 as fast as one indexed assignment
        n = len(examples.input_ids[i])
        ids[r, :n], mask[r, :n], types[r, :n] = examples.input_ids[i], 1, examples.token_type_ids[i]
    weights = (np.arange(batch_size) < len(rows)).astype(np.float32)
    return Batch(ids, mask, types, _labels(examples, all_rows, length), weights, _hidden(examples, all_rows, length))


def _hidden(examples: Examples, rows: np.ndarray, length: int) -> Hidden | None:
    if examples.hidden is None:
        return None
    own = [examples.hidden.states[i] for i in rows]
    width = examples.hidden.width(length)
    states = np.zeros((len(rows), width, own[0].shape[1]), own[0].dtype)
    for row, found in zip(states, own, strict=True):
        row[: len(found)] = found
    return Hidden(states, examples.hidden.layer)


def _labels(examples: Examples, rows: np.ndarray, length: int) -> np.ndarray:
    labels = examples.labels[rows]
    if examples.unlabelled is None:
        return labels
    padded = np.full((len(rows), length), examples.unlabelled, labels.dtype)
    width = min(length, labels.shape[1])
    padded[:, :width] = labels[:, :width]
    return padded
