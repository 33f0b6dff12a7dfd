"""The choice of padded lengths, against all other choices and against batches that were not looked at."""

import itertools

import numpy as np
import pytest

from jpeft.data import padding
from jpeft.data.padding import Part

LENGTHS = np.random.default_rng(1).gamma(2.0, 12.0, 1000).astype(int) + 2


def padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_buckets", [1, 2, 3, 4])
def test_length_buckets_are_the_best_of_all(seed, max_buckets):
    lengths = np.random.default_rng(seed).gamma(2.0, 12.0, 200).astype(int) + 2
    found = padding.length_buckets(lengths, max_buckets, multiple=8)
    candidates = range(8, lengths.max() + 8, 8)
    best = min(
        padded(lengths, choice)
        for k in range(1, max_buckets + 1)
        for choice in itertools.combinations(candidates, k)
        if choice[-1] >= lengths.max()
    )
    assert padded(lengths, found) == best
    assert len(found) <= max_buckets
    assert list(found) == sorted(set(found))


def test_length_buckets_edges():
    assert padding.length_buckets([5, 5, 8]) == (8,)
    assert padding.length_buckets([9]) == (16,)
    assert padding.length_buckets([5, 100], multiple=1) == (5, 100)
    with pytest.raises(ValueError, match="at least one row"):
        padding.length_buckets([])


def tokens(layout):
    return sum(rows * length for rows, length in layout)


def expected(layouts, lengths, batch_size, seed=9):
    """Padded tokens of random batches, each in the cheapest layout that holds it; all, and none wasted."""
    rng = np.random.default_rng(seed)
    cost = real = 0
    for _ in range(500):
        rows = np.sort(rng.choice(lengths, batch_size))
        cost += min(tokens(layout) for layout in layouts if (rows <= padding.tops(layout)).all())
        real += rows.sum()
    return cost / real


def test_each_layout_more_and_each_part_more_saves_tokens():
    found = {n: padding.layouts(LENGTHS, 16, max_parts=4, max_layouts=n) for n in (1, 2, 3, 4)}
    assert [len(layouts) for layouts in found.values()] == [1, 2, 3, 4]
    assert found[1] == ((Part(16, -(-LENGTHS.max() // 8) * 8),),)
    costs = [expected(layouts, LENGTHS, 16) for layouts in found.values()]
    assert costs[0] > 2 * costs[1]
    assert costs == sorted(costs, reverse=True)
    parts = [expected(padding.layouts(LENGTHS, 16, max_parts=n), LENGTHS, 16) for n in (1, 2, 4)]
    assert parts == sorted(parts, reverse=True)
    # Against a random batch padded to its own longest row, whatever that is.
    rows = np.random.default_rng(3).choice(LENGTHS, (500, 16))
    assert costs[2] < 0.85 * (16 * rows.max(1)).sum() / rows.sum()


@pytest.mark.parametrize("more", [2, 3])
def test_the_layout_that_is_added_is_the_best_beside_those_before(more):
    """By batches that the choice has not seen, up to their noise."""
    before, chosen = (padding.layouts(LENGTHS, 16, max_layouts=n) for n in (more - 1, more))
    least = expected(chosen, LENGTHS, 16)
    rows = np.sort(np.random.default_rng(8).choice(LENGTHS, (4000, 16)), axis=1)
    for share, parts in itertools.product((0.6, 0.8, 0.9, 0.95, 0.99), (1, 2, 3, 4)):
        held = np.ceil(np.quantile(rows, share, axis=0)).astype(int)
        lengths = np.array(padding.length_buckets(held, parts))
        counts = np.bincount(np.searchsorted(lengths, held), minlength=len(lengths))
        other = tuple(Part(int(n), int(x)) for n, x in zip(counts, lengths, strict=True))
        assert least < 1.02 * expected((*before, other), LENGTHS, 16)


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_every_layout_has_the_batch_and_the_last_holds_the_longest(batch_size):
    layouts = padding.layouts(LENGTHS, batch_size, multiple=4, longest=91)
    assert {sum(part.rows for part in layout) for layout in layouts} == {batch_size}
    assert [tokens(layout) for layout in layouts] == sorted(tokens(layout) for layout in layouts)
    assert layouts[-1] == (Part(batch_size, min(91, -(-LENGTHS.max() // 4) * 4)),)
    for layout in layouts:
        assert [part.length for part in layout] == sorted({part.length for part in layout})
        assert all(part.rows > 0 for part in layout)


def test_a_layout_that_saves_less_than_it_is_worth_is_left_out():
    least = padding.layouts(LENGTHS, 16, worth=1e9)
    assert len(least) == 1
    saved = (
        expected(least, LENGTHS, 16) - expected(padding.layouts(LENGTHS, 16, max_layouts=2), LENGTHS, 16)
    ) * LENGTHS.sum()
    assert len(padding.layouts(LENGTHS, 16, max_parts=1, worth=1.2 * saved)) == 1
    assert len(padding.layouts(LENGTHS, 16, worth=0.1 * saved)) > 1


def test_layouts_of_few_rows():
    assert padding.layouts([5], 16) == ((Part(16, 8),),)
    assert padding.layouts([5, 100], 2, longest=90)[-1] == (Part(2, 90),)
    with pytest.raises(ValueError, match="at least one row"):
        padding.layouts([], 16)
