"""Tokens of texts, against the tokenizer's own where that can be asked."""

import random
import string

import numpy as np
import pytest

from jpeft.data import batching, encoding
from jpeft.data import tokenizer as tokenizers
from jpeft.data.padding import Part
from jpeft.models import pretrained


def test_labels_of_words_lie_at_their_first_tokens(tiny_model):
    tokenizer = tokenizers.load(tiny_model, 18, words=True)
    split = {"words": [["the", "big-dog", "runs"], ["a"]], "label": [[3, 4, 5], [6]]}
    found = encoding.tokenize_words(split, "words", tokenizer, 8, -100)
    # [CLS] the big - dog runs [SEP]
    assert found.labels.tolist() == [[-100, 3, 4, -100, -100, 5, -100], [-100, 6, *[-100] * 5]]
    cut = encoding.tokenize_words(split, "words", tokenizer, 5, -100)
    assert cut.labels.tolist() == [[-100, 3, 4, -100, -100], [-100, 6, -100, -100, -100]]
    (batch,) = next(batching.train_batches(found, [(Part(2, 10),)], seed=0, epoch=0))
    assert (batch.labels.shape, (batch.labels != -100).sum()) == ((2, 10), 4)
    for row, ids in zip(batch.labels, batch.input_ids, strict=True):
        (i,) = (i for i in range(2) if len(found.input_ids[i]) == (ids > 0).sum())
        assert row[row != -100].tolist() == split["label"][i]
    taken = batching.take(found, [1])
    assert next(batching.eval_batches(taken, 1, (4,)))[0].labels.tolist() == [[-100, 6, -100, -100]]


def test_first_tokens_of_words():
    assert encoding.first_tokens([None, 0, 0, 2, None], 4).tolist() == [1, -1, 3, -1]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def real(request, tmp_path_factory):
    """A WordPiece tokenizer with BERT's layout of pairs, or a byte-level one with RoBERTa's."""
    if request.param == "bert":
        return tokenizers.load(pretrained._find("minilm", None)[0], 30522)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    vocabulary = {token: i for i, token in enumerate((*specials, *alphabet, "ab", "cd"))}
    plain = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("c", "d")], unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def test_long_pairs_are_cut_as_the_tokenizer_cuts_them(real):
    rng = random.Random(0)
    for _ in range(200):
        first, second = (
            " ".join("".join(rng.choices(string.ascii_lowercase + "é.", k=rng.randint(1, 6))) for _ in range(n))
            for n in (rng.randint(0, 12), rng.randint(0, 12))
        )
        most = rng.randint(8, 24)
        found = real([first], [second], truncation="longest_first", max_length=most)
        ids, types = encoding.long_pair(first, second, real, most)
        assert ids == found["input_ids"][0], (first, second, most)
        assert types == found.get("token_type_ids", [[0] * len(ids)])[0]


def test_a_pair_of_thousands_of_words_takes_no_gigabytes(real):
    long = "a b c d e " * 4000
    split = {"one": ["a b", long, "c"], "two": ["c", long, "d"], "label": [0, 1, 2]}
    found = encoding.tokenize(split, ("one", "two"), real, 16, np.int32)  # by the library alone: minutes, and 19 GB
    assert found.lengths[1] == 16
    alone = encoding.tokenize({k: v[:1] for k, v in split.items()}, ("one", "two"), real, 16, np.int32)
    np.testing.assert_array_equal(found.input_ids[0], alone.input_ids[0])
    cut = real("a b c d e " * 8, "a b c d e " * 8, truncation="longest_first", max_length=16)
    np.testing.assert_array_equal(found.input_ids[1], cut["input_ids"])
