import itertools

import numpy as np
import pytest

from jpeft.data import batching
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
    batch = next(batching.train_batches(found, 1, (8,), seed=0, epoch=0))
    np.testing.assert_array_equal(batch.input_ids, [[0, 1, 2, 2, 2, 2, 1, 1]])


def padded(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_buckets", [1, 2, 3, 4])
def test_length_buckets_are_the_best_of_all(seed, max_buckets):
    lengths = np.random.default_rng(seed).gamma(2.0, 12.0, 200).astype(int) + 2
    found = batching.length_buckets(lengths, max_buckets, multiple=8)
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
    assert batching.length_buckets([5, 5, 8]) == (8,)
    assert batching.length_buckets([9]) == (16,)
    assert batching.length_buckets([5, 100], multiple=1) == (5, 100)
    with pytest.raises(ValueError, match="at least one row"):
        batching.length_buckets([])


def test_an_epoch_holds_every_row_once(examples):
    buckets = batching.length_buckets(examples.lengths)
    batches = list(batching.train_batches(examples, 16, buckets, seed=3, epoch=0))
    assert len(batches) == batching.num_batches(examples.size, 16) == 63
    assert sorted(np.concatenate([rows(b) for b in batches])) == list(range(examples.size))
    assert {b.input_ids.shape for b in batches} <= {(16, n) for n in buckets}
    assert sum(b.weights.sum() for b in batches) == examples.size
    for b in batches:
        real = b.attention_mask.sum(1)
        np.testing.assert_array_equal(real, examples.lengths[b.labels])  # labels are the row numbers
        assert b.input_ids.shape[1] == min(n for n in buckets if n >= real.max())
        np.testing.assert_array_equal(b.attention_mask, np.arange(b.input_ids.shape[1]) < real[:, None])
        np.testing.assert_array_equal(b.input_ids, b.attention_mask * (b.labels + 1)[:, None])
        np.testing.assert_array_equal(b.token_type_ids[0, : real[0]], examples.token_type_ids[b.labels[0]])
    assert [a.dtype for a in batches[0]] == [np.int32] * 4 + [np.float32]


def test_the_order_depends_on_seed_and_epoch_alone(examples):
    def order(seed, epoch):
        return np.concatenate([rows(b) for b in batching.train_batches(examples, 16, (64,), seed, epoch)])

    np.testing.assert_array_equal(order(0, 0), order(0, 0))
    first = order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert np.mean(first == other) < 0.05
    assert not np.array_equal(order(1, 0), order(0, 1))


def test_start_goes_on_where_the_epoch_was_left(examples):
    whole = list(batching.train_batches(examples, 16, (32, 64), 0, 2))
    rest = list(batching.train_batches(examples, 16, (32, 64), 0, 2, start=40))
    assert len(rest) == len(whole) - 40
    for a, b in zip(whole[40:], rest, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not list(batching.train_batches(examples, 16, (64,), 0, 2, start=63))


def test_grouping_by_length_saves_padding_and_still_mixes(examples):
    buckets = batching.length_buckets(examples.lengths)
    batches = list(batching.train_batches(examples, 16, buckets, 0, 0))
    grouped = sum(b.input_ids.size for b in batches)
    shuffled = np.random.default_rng(0).permutation(examples.lengths)[:992].reshape(-1, 16)
    assert grouped < 1.02 * padded(examples.lengths, buckets)  # the least that these buckets allow
    assert grouped < 0.75 * (shuffled.max(1) * 16).sum()
    widths = [b.input_ids.shape[1] for b in batches]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))
    for width in buckets:  # rows of all lengths of a bucket meet in its batches
        whole = [b.attention_mask.sum(1) for b in batches if b.input_ids.shape[1] == width]
        assert np.mean([len(set(lengths)) for lengths in whole]) > 4


def test_seeds_have_batches_of_one_shape_at_every_step_and_epochs_have_not(examples):
    def widths(seed, epoch):
        return [b.input_ids.shape[1] for b in batching.train_batches(examples, 16, (16, 32, 64), seed, epoch)]

    assert widths(0, 1) == widths(1, 1) == widths(2, 1)
    assert widths(0, 1) != widths(0, 2)


def test_the_last_batch_is_filled_with_copies_of_weight_zero():
    batches = list(batching.train_batches(ragged([3, 4, 5, 6, 7]), 4, (8,), 0, 0))
    (partial,) = [b for b in batches if b.weights.sum() < 4]
    np.testing.assert_array_equal(partial.weights, [1, 0, 0, 0])
    for array in partial[:4]:
        np.testing.assert_array_equal(array, np.repeat(array[:1], 4, axis=0))
    assert partial.attention_mask[3].any()


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
