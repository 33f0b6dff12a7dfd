"""The lengths that rows are padded to: few, since every shape of a batch is a program to compile.

Padding a random batch to its longest row adds 24 % to 165 % on the GLUE tasks. Batches of rows of similar length waste
little, but trained worse on the built-in data (docs/design.md). So batches for training are random, and each is cut, by
length, into a few parts that are padded to lengths of their own: a `Layout`. A batch gets the smallest that holds it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Layout", "Part", "layouts", "length_buckets", "padded_lengths", "tops"]

SAMPLE = 512  # random batches, to choose layouts for
# A candidate for each: its i-th shortest row holds the i-th shortest row of this share of the batches.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)


class Part(NamedTuple):
    """Rows of a batch that are padded to one length."""

    rows: int
    length: int


Layout = tuple[Part, ...]  # of the batches for training, from the shortest rows to the longest


def length_buckets(
    lengths: np.ndarray | Sequence[int], max_buckets: int = 4, multiple: int = 8, worth: float = 0.0
) -> tuple[int, ...]:
    """Chooses the padded lengths that waste the least on rows of these lengths.

    Args:
      lengths: tokens of every row.
      max_buckets: at most this many lengths, and so compilations of a step.
      multiple: every padded length is a multiple of it.
      worth: the tokens that one more length must save, since it costs a compilation.

    Returns:
      The lengths, ascending. The choice is exact: no other one of as many lengths has fewer padded tokens.

    Raises:
      ValueError: if there are no rows.

    >>> length_buckets([3, 4, 20, 30, 31], max_buckets=2)
    (8, 32)
    """
    if len(lengths) == 0 or max_buckets < 1:
        raise ValueError("length_buckets needs at least one row and one bucket")
    # The best cover of all rows up to candidate i ends with a bucket of that length over the rows beyond some j < i.
    sizes, counts = np.unique(-(-np.asarray(lengths) // multiple) * multiple, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    cost = np.where(below == 0, 0.0, np.inf)
    plans: list[tuple[int, ...]] = [()] * len(below)
    for _ in range(max_buckets):
        before = cost[-1], plans[-1]
        # Going down, `cost[j]` for j < i still is the one with a bucket less.
        for i in range(len(sizes), 0, -1):
            through = cost[:i] + sizes[i - 1] * (below[i] - below[:i])
            j = int(np.argmin(through))
            if through[j] < cost[i]:
                cost[i], plans[i] = through[j], (*plans[j], int(sizes[i - 1]))
        if before[0] - cost[-1] <= worth:
            return before[1]
    return plans[-1]


def layouts(
    lengths: np.ndarray | Sequence[int],
    batch_size: int,
    max_parts: int = 4,
    max_layouts: int = 3,
    multiple: int = 8,
    worth: float = 0.0,
    longest: int | None = None,
) -> tuple[Layout, ...]:
    """Chooses the layouts that waste little padding on random batches of rows of these lengths.

    One layout holds every batch. The others are added one at a time: each is the candidate that saves the most padded
    tokens on a sample of batches.

    Args:
      lengths: tokens of every row to train on.
      batch_size: rows of a batch.
      max_parts: of a layout, at most.
      max_layouts: at most this many.
      multiple: every padded length is a multiple of it.
      worth: the tokens of an epoch that one more part must save, since it takes time to compile.
      longest: the greatest padded length, even if it is not a multiple of `multiple`.

    Returns:
      The layouts, from the fewest padded tokens to the most. Each has `batch_size` rows; the last holds every batch.

    Raises:
      ValueError: if there are no rows.
    """
    if len(lengths) == 0:
        raise ValueError("layouts needs at least one row")
    sample = np.sort(np.random.default_rng(0).choice(lengths, (SAMPLE, batch_size)), axis=1)

    def cut(lengths_held: np.ndarray, parts: int) -> Layout:
        found = np.array(length_buckets(lengths_held, parts, multiple))
        rows = np.bincount(np.searchsorted(found, lengths_held), minlength=len(found))
        return tuple(Part(int(n), int(min(x, longest or x))) for n, x in zip(rows, found, strict=True))

    chosen = [cut(np.full(batch_size, np.max(lengths)), 1)]
    quantiles = [np.ceil(np.quantile(sample, share, axis=0)).astype(int) for share in SHARES]
    candidates = {cut(each, parts) for each in quantiles for parts in range(1, max_parts + 1)}
    saved = {  # by layout and batch, against the one that holds all
        layout: np.where((sample <= tops(layout)).all(1), _tokens(chosen[0]) - _tokens(layout), 0)
        for layout in sorted(candidates)
    }
    now, epoch = np.zeros(SAMPLE), math.ceil(len(lengths) / batch_size)
    while saved and len(chosen) < max_layouts:
        gain = {x: epoch * np.maximum(own - now, 0).mean() - worth * len(x) for x, own in saved.items()}
        best = max(gain, key=lambda layout: gain[layout])
        if gain[best] <= 0:
            break
        chosen.append(best)
        now = np.maximum(now, saved.pop(best))
    return tuple(sorted(chosen, key=_tokens))


def padded_lengths(layouts: Sequence[Layout]) -> list[int]:
    """All lengths that rows are padded to, ascending."""
    return sorted({part.length for layout in layouts for part in layout})


def tops(layout: Layout) -> np.ndarray:
    """The padded length of each row of a batch, [batch_size]."""
    return np.repeat([part.length for part in layout], [part.rows for part in layout])


def _tokens(layout: Layout) -> int:
    return sum(part.rows * part.length for part in layout)
