import itertools

import chex
import jax
import numpy as np
import pytest

from jpeft.data import batching
from jpeft.data.batching import Stratum
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
    (batch,) = next(batching.train_batches(found, [Stratum(1, 8)], seed=0, epoch=0))
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_strata", [1, 2, 3])
def test_strata_are_the_best_of_all(seed, max_strata):
    lengths = np.random.default_rng(seed).gamma(2.0, 12.0, 203).astype(int) + 2
    found = batching.strata(lengths, 7, max_strata, multiple=4)

    def cost(cuts):
        """Padded tokens of a full batch, from the rows that would be dealt to each stratum."""
        ends = [203 * c // 7 for c in (*cuts, 7)]
        tops = [-(-np.sort(lengths)[:end].max() // 4) * 4 for end in ends]
        return sum(n * top for n, top in zip(np.diff((0, *cuts, 7)), tops, strict=True))

    best = min(cost(cuts) for k in range(max_strata) for cuts in itertools.combinations(range(1, 7), k))
    assert sum(rows * length for rows, length in found) == best
    assert sum(rows for rows, _ in found) == 7
    assert len(found) <= max_strata


def test_strata_edges():
    assert batching.strata([5], 16) == (Stratum(16, 8),)
    assert batching.strata([5, 100], 2, longest=90) == (Stratum(1, 8), Stratum(1, 90))
    assert batching.strata([5, 100], 2, worth=91) == (Stratum(1, 8), Stratum(1, 104))
    assert batching.strata([5, 100], 2, worth=97) == (Stratum(2, 104),)
    with pytest.raises(ValueError, match="at least one row"):
        batching.strata([], 16)


@pytest.mark.parametrize("size", [1, 2, 5, 15, 16, 17, 63, 64, 65, 1003])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_epoch_holds_every_row_once(size, batch_size):
    examples = ragged(np.random.default_rng(size).integers(2, 60, size))
    strata = batching.strata(examples.lengths, batch_size)
    batches = list(batching.train_batches(examples, strata, seed=3, epoch=0))
    assert len(batches) == batching.num_batches(size, batch_size)
    parts = [part for batch in batches for part in batch]
    assert sorted(np.concatenate([rows(part) for part in parts])) == list(range(size))
    for batch in batches:
        assert [part.input_ids.shape for part in batch] == [tuple(stratum) for stratum in strata]
        assert sum(part.weights.sum() for part in batch) == batch_size or batch is batches[-1]
    for part in parts:
        real = part.attention_mask.sum(1)
        np.testing.assert_array_equal(real, examples.lengths[part.labels])  # labels are the row numbers
        np.testing.assert_array_equal(part.attention_mask, np.arange(part.input_ids.shape[1]) < real[:, None])
        np.testing.assert_array_equal(part.input_ids, part.attention_mask * (part.labels + 1)[:, None])
        np.testing.assert_array_equal(part.token_type_ids[0, : real[0]], examples.token_type_ids[part.labels[0]])
        assert [a.dtype for a in part] == [np.int32] * 4 + [np.float32]


def test_the_order_depends_on_seed_and_epoch_alone(examples):
    def order(seed, epoch):
        strata = batching.strata(examples.lengths, 16)
        return np.concatenate(
            [rows(b) for parts in batching.train_batches(examples, strata, seed, epoch) for b in parts]
        )

    np.testing.assert_array_equal(order(0, 0), order(0, 0))
    first = order(0, 0)
    for other in (order(0, 1), order(1, 0)):
        assert np.mean(first == other) < 0.05
    assert not np.array_equal(order(1, 0), order(0, 1))


def test_start_goes_on_where_the_epoch_was_left(examples):
    strata = batching.strata(examples.lengths, 16)
    whole = list(batching.train_batches(examples, strata, 0, 2))
    rest = list(batching.train_batches(examples, strata, 0, 2, start=40))
    assert len(rest) == len(whole) - 40
    chex.assert_trees_all_equal(whole[40:], rest)
    assert not list(batching.train_batches(examples, strata, 0, 2, start=63))


def test_every_batch_is_like_the_data_and_pads_little(examples):
    """Mean length and its scatter: of a random batch they differ from those of the data by far more."""
    strata = batching.strata(examples.lengths, 16, multiple=1)
    batches = list(batching.train_batches(examples, strata, 0, 0))[:-1]
    means = np.array([sum(part.attention_mask.sum() for part in batch) / 16 for batch in batches])
    random = np.random.default_rng(0).permutation(examples.lengths)[:992].reshape(-1, 16)
    assert abs(means.mean() - examples.lengths.mean()) < 0.2
    assert means.std() < random.mean(1).std() / 2
    padded = sum(stratum.rows * stratum.length for stratum in strata) * len(batches)
    assert padded < 1.25 * examples.lengths.sum()
    assert padded < 0.7 * (random.max(1) * 16).sum()


def test_rows_of_a_stratum_meet_in_all_combinations(examples):
    """Not the same short rows together, epoch after epoch."""
    strata = batching.strata(examples.lengths, 16)
    firsts = [[set(rows(batch[0])) for batch in batching.train_batches(examples, strata, 0, e)] for e in (0, 1)]
    shared = [len(a & b) for a in firsts[0] for b in firsts[1]]
    assert max(shared) <= 3


def test_the_last_batch_is_filled_with_copies_of_weight_zero():
    strata = (Stratum(1, 4), Stratum(3, 8))
    whole, partial = batching.train_batches(ragged([3, 4, 5, 6, 7]), strata, 0, 0)
    assert [part.weights.tolist() for part in whole] == [[1], [1, 1, 1]]
    assert [part.weights.tolist() for part in partial] == [[0], [1, 0, 0]]
    for part in partial:
        assert part.attention_mask.any(axis=1).all()
    for batch, devices in itertools.product((whole, partial), (1, 2, 8)):
        filled = list(batching.train_batches(ragged([3, 4, 5, 6, 7]), strata, 0, 0, multiple=devices))
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
    with pytest.raises(ValueError, match="9 tokens fits no bucket"):
        list(batching.train_batches(ragged([3, 9]), [Stratum(2, 8)], 0, 0))


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
