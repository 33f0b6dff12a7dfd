import itertools

import chex
import jax
import numpy as np
import pytest

from jpeft.data import batching, padding
from jpeft.data.padding import Part
from jpeft.data.tasks import TASKS


def ragged(lengths, dtype=np.int32):
    """Row i consists of the token i + 1, so that every row can be told from the others."""
    ids = tuple(np.full(n, i + 1, np.int32) for i, n in enumerate(lengths))
    types = tuple((np.arange(n) > n // 2).astype(np.int32) for n in lengths)
    return batching.Examples(ids, types, np.arange(len(lengths)).astype(dtype))


@pytest.fixture
def examples():
    return ragged(np.random.default_rng(0).integers(2, 60, 1003))


def rows(batch):
    return batch.input_ids[:, 0][batch.weights == 1] - 1


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(words))
    return BertTokenizerFast(str(path))


def test_tokenize_pairs(bert_tokenizer):
    split = {"premise": ["a b", "a b c d e f"], "hypothesis": ["c", "a b"], "label": [2, 0]}
    found = TASKS["mnli"].encode(split, bert_tokenizer, max_length=8)
    assert found.size == 2
    # [CLS] a b [SEP] c [SEP]; then three tokens of six are cut, all from the longer text.
    np.testing.assert_array_equal(found.input_ids[0], [2, 5, 6, 3, 7, 3])
    np.testing.assert_array_equal(found.token_type_ids[0], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found.input_ids[1], [2, 5, 6, 7, 3, 5, 6, 3])
    assert found.input_ids[0].dtype == found.token_type_ids[0].dtype == found.labels.dtype == np.int32
    np.testing.assert_array_equal(found.labels, [2, 0])


def test_tokenize_without_token_types_and_regression():
    class Roberta:
        pad_token_id = 1

        def __call__(self, first, second, **options):
            return {"input_ids": [[0, len(a), 2, 2, len(b), 2] for a, b in zip(first, second, strict=True)]}

    split = {"sentence1": ["x"], "sentence2": ["yz"], "label": [3.25]}
    found = TASKS["stsb"].encode(split, Roberta(), max_length=8)
    np.testing.assert_array_equal(found.token_type_ids[0], np.zeros(6))
    assert found.labels.dtype == np.float32
    assert found.labels[0] == 3.25
    (batch,) = next(batching.train_batches(found, [(Part(1, 8),)], seed=0, epoch=0))
    np.testing.assert_array_equal(batch.input_ids, [[0, 1, 2, 2, 2, 2, 1, 1]])


def counted(batch):
    """The rows of a batch that count."""
    return np.concatenate([rows(part) for part in batch])


@pytest.mark.parametrize("size", [1, 2, 5, 15, 16, 17, 63, 64, 65, 1003])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_epoch_holds_every_row_once(size, batch_size):
    examples = ragged(np.random.default_rng(size).integers(2, 60, size))
    layouts = padding.layouts(examples.lengths, batch_size)
    batches = list(batching.train_batches(examples, layouts, seed=3, epoch=0))
    assert len(batches) == batching.num_batches(size, batch_size)
    assert sorted(np.concatenate([counted(batch) for batch in batches])) == list(range(size))
    for batch in batches:
        assert tuple(part.input_ids.shape for part in batch) in layouts
        assert len(counted(batch)) == batch_size or batch is batches[-1]
    for part in (part for batch in batches for part in batch):
        real = part.attention_mask.sum(1)
        np.testing.assert_array_equal(real, examples.lengths[part.labels])  # labels are the row numbers
        np.testing.assert_array_equal(part.attention_mask, np.arange(part.input_ids.shape[1]) < real[:, None])
        np.testing.assert_array_equal(part.input_ids, part.attention_mask * (part.labels + 1)[:, None])
        np.testing.assert_array_equal(part.token_type_ids[0, : real[0]], examples.token_type_ids[part.labels[0]])
        assert [a.dtype for a in jax.tree.leaves(part)] == [np.int32] * 4 + [np.float32]


def test_the_order_depends_on_seed_and_epoch_alone(examples):
    def order(seed, epoch):
        layouts = padding.layouts(examples.lengths, 16)
        return np.concatenate([counted(b) for b in batching.train_batches(examples, layouts, seed, epoch)])

    np.testing.assert_array_equal(order(0, 0), order(0, 0))
    first = order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert np.mean(first == other) < 0.1
    assert not np.array_equal(order(1, 0), order(0, 1))


def test_start_goes_on_where_the_epoch_was_left(examples):
    layouts = padding.layouts(examples.lengths, 16)
    whole = list(batching.train_batches(examples, layouts, 0, 2))
    rest = list(batching.train_batches(examples, layouts, 0, 2, start=40))
    assert len(rest) == len(whole) - 40
    chex.assert_trees_all_equal(whole[40:], rest)
    assert not list(batching.train_batches(examples, layouts, 0, 2, start=63))


def test_batches_are_random_samples():
    """By the variance of a batch's mean length, and by how often two rows meet: as without replacement."""
    lengths = np.random.default_rng(0).integers(2, 60, 320)
    examples, layouts = ragged(lengths), padding.layouts(lengths, 16)
    means, met, of_equal = [], 0, 0
    first = np.flatnonzero(lengths == lengths[0])
    for epoch in range(300):
        batches = [counted(batch) for batch in batching.train_batches(examples, layouts, 7, epoch)]
        means += [lengths[batch].mean() for batch in batches]
        met += any({0, 1} <= set(batch) for batch in batches)
        of_equal += any(set(first[:2]) <= set(batch) for batch in batches)
    assert np.var(means) == pytest.approx(lengths.var(ddof=1) * (1 / 16 - 1 / 320), rel=0.06)
    for times in (met, of_equal):  # 15 of 319; four standard errors
        assert abs(times / 300 - 15 / 319) < 4 * np.sqrt(15 / 319 / 300)


def test_seeds_have_batches_of_one_layout_at_every_step_and_epochs_have_not(examples):
    layouts = padding.layouts(examples.lengths, 16)

    def shapes(seed, epoch):
        return [
            tuple(part.input_ids.shape for part in batch)
            for batch in batching.train_batches(examples, layouts, seed, epoch)
        ]

    assert len(set(shapes(0, 1))) > 1
    assert shapes(0, 1) == shapes(1, 1) == shapes(2, 1)
    assert shapes(0, 1) != shapes(0, 2)


def test_grouped_batches_hold_every_row_once_at_one_length_and_hardly_pad(examples):
    layouts = [(Part(16, length),) for length in padding.length_buckets(examples.lengths, 6)]

    def epoch_of(seed, epoch, start=0):
        return list(batching.train_batches(examples, layouts, seed, epoch, start, grouped=True))

    batches = epoch_of(0, 1)
    rows = [counted(batch) for batch in batches]
    assert sorted(np.concatenate(rows)) == list(range(examples.size))
    padded = sum(part.input_ids.shape[1] * len(own) for (part,), own in zip(batches, rows, strict=True))
    at_random = batching.train_batches(examples, padding.layouts(examples.lengths, 16, max_parts=1), 0, 1)
    assert padded < 1.2 * examples.lengths.sum() < 0.9 * sum(part.input_ids.size for (part,) in at_random)
    shapes = [part.input_ids.shape for (part,) in batches]
    assert shapes == [part.input_ids.shape for (part,) in epoch_of(1, 1)]  # seeds train together
    assert shapes != sorted(shapes)
    assert shapes != [part.input_ids.shape for (part,) in epoch_of(0, 2)]
    assert {frozenset(own) for own in rows}.isdisjoint(frozenset(counted(batch)) for batch in epoch_of(0, 2))
    chex.assert_trees_all_equal(batches[40:], epoch_of(0, 1, start=40))


def test_seeds_have_other_batches_though_no_two_rows_are_of_one_length():
    examples = ragged(range(2, 200))
    layouts = padding.layouts(examples.lengths, 16)
    batches = [[set(counted(b)) for b in batching.train_batches(examples, layouts, seed, 0)] for seed in (0, 1)]
    shared = [len(a & b) for a, b in zip(*batches, strict=True)]
    assert np.mean(shared) < 6


def test_a_batch_gets_the_first_layout_that_holds_it():
    tight, wide = (Part(2, 4), Part(1, 8)), (Part(3, 16),)
    for lengths, layout in (((4, 8, 4), tight), ((4, 5, 5), wide), ((1, 4, 9), wide)):
        (batch,) = batching.train_batches(ragged(lengths), (tight, wide), 0, 0)
        assert tuple(part.input_ids.shape for part in batch) == layout


def test_the_last_batch_is_filled_with_copies_of_weight_zero():
    layouts = ((Part(1, 8), Part(3, 8)),)
    whole, partial = batching.train_batches(ragged([3, 4, 5, 6, 7]), layouts, 0, 0)
    assert [part.weights.tolist() for part in whole] == [[1], [1, 1, 1]]
    assert sorted(np.concatenate([part.weights for part in partial])) == [0, 0, 0, 1]
    for part in partial:
        assert part.attention_mask.any(axis=1).all()
    for batch, devices in itertools.product((whole, partial), (1, 2, 8)):
        filled = list(batching.train_batches(ragged([3, 4, 5, 6, 7]), layouts, 0, 0, multiple=devices))
        for part, more in zip(batch, filled[batch is partial], strict=True):
            n = len(part.labels)
            assert len(more.labels) == -(-n // devices) * devices
            assert not more.weights[n:].any()
            chex.assert_trees_all_equal(part, jax.tree.map(lambda x, n=n: x[:n], more))


def test_eval_batches_give_the_rows_back(examples):
    restored = np.full(examples.size, -1)
    widths = []
    for batch, indices in batching.eval_batches(examples, 32, (8, 16, 32, 64)):
        assert batch.weights.sum() == len(indices)
        restored[indices] = batch.labels[: len(indices)]
        widths.append(batch.input_ids.shape[1])
    np.testing.assert_array_equal(restored, np.arange(examples.size))
    assert widths == sorted(widths)


def test_a_row_longer_than_every_bucket_is_an_error():
    with pytest.raises(ValueError, match="9 tokens fits no bucket"):
        list(batching.eval_batches(ragged([3, 9]), 2, (4, 8)))
    with pytest.raises(ValueError, match="9 tokens fits no layout"):
        list(batching.train_batches(ragged([3, 9]), [(Part(2, 8),)], 0, 0))


def test_sample_is_seeded_and_nested(examples):
    chosen, indices = batching.sample(examples, 10, seed=4)
    assert chosen.size == len(set(indices)) == 10
    np.testing.assert_array_equal(chosen.labels, indices)
    np.testing.assert_array_equal(chosen.lengths, examples.lengths[indices])
    np.testing.assert_array_equal(batching.sample(examples, 30, seed=4)[1][:10], indices)
    assert not np.array_equal(batching.sample(examples, 10, seed=5)[1], indices)
    assert batching.sample(examples, 10**6, seed=4)[0].size == examples.size


def test_rows_can_be_drawn_before_they_are_tokenised(examples):
    _, indices = batching.sample(examples, 7, seed=3)
    assert batching.drawn(examples.size, 7, seed=3).tolist() == indices.tolist()
    assert sorted(batching.drawn(5, 99, seed=3).tolist()) == [0, 1, 2, 3, 4]


def test_take_keeps_the_order_asked_for(examples):
    np.testing.assert_array_equal(batching.take(examples, [7, 3, 3]).labels, [7, 3, 3])
    assert batching.take(examples, []).size == 0


def test_by_length_has_one_batch_a_bucket_and_every_row_once(examples):
    batches, order = batching.by_length(examples, (8, 24, 64))
    assert [batch.input_ids.shape[1] for batch in batches] == [8, 24, 64]
    np.testing.assert_array_equal(np.concatenate([rows(batch) for batch in batches]), order)
    assert sorted(order) == list(range(examples.size))
    for batch, least in zip(batches, (0, 8, 24), strict=True):
        lengths = batch.attention_mask.sum(1)
        assert (lengths > least).all()
        assert (lengths <= batch.input_ids.shape[1]).all()
    with pytest.raises(ValueError, match="fits no bucket"):
        batching.by_length(examples, (8, 24))
