"""From text to tokens."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.data.batching import Examples

__all__ = ["first_tokens", "long_pair", "tokenize", "tokenize_words"]

MANY = 16  # characters per token of the greatest length: pairs of two longer texts are cut by `long_pair`


def tokenize(
    split: Mapping[str, Sequence[Any]] | Any, text: Sequence[str], tokenizer: Any, max_length: int, label_type: type
) -> Examples:
    """Tokenises a split of a task.

    Args:
      split: a `datasets.Dataset`, or columns by name.
      text: the columns with text, one or two.
      tokenizer: a Hugging Face tokenizer.
      max_length: longer rows are cut, the longer text of a pair first.
      label_type: the type of the column "label", np.int32 or np.float32.

    Returns:
      The rows in their order. Token types are 0 where the tokenizer has none, as RoBERTa's.
    """
    texts = [list(split[column]) for column in text]
    labels = np.asarray(list(split["label"]), label_type)
    rows = list(zip(*texts, strict=True))
    long = [i for i, row in enumerate(rows) if len(row) == 2 and min(map(len, row)) > MANY * max_length]
    for i in long:  # in their place for now, as nothing else depends on them
        for column in texts:
            column[i] = ""
    encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length) if rows else {"input_ids": []}
    examples = _examples(encoded, labels, tokenizer)
    return examples if not long else _with_long(examples, {i: rows[i] for i in long}, tokenizer, max_length)


def _with_long(examples: Examples, pairs: Mapping[int, tuple[str, str]], tokenizer: Any, max_length: int) -> Examples:
    ids, types = list(examples.input_ids), list(examples.token_type_ids)
    for i, pair in pairs.items():
        own, kinds = long_pair(*pair, tokenizer, max_length)
        ids[i], types[i] = np.asarray(own, np.int32), np.asarray(kinds, np.int32)
    return examples._replace(input_ids=tuple(ids), token_type_ids=tuple(types))


def long_pair(first: str, second: str, tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """The token ids and token types of a pair, as `tokenizer` itself cuts it with "longest_first".

    The tokenizers library makes all combinations of what it cuts off from the one text and from the other, though
    nobody asks for them. That takes gigabytes for a pair of some thousand words; this takes what the pair takes.
    """
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second)]
    sample = tokenizer("a", "a")
    types = sample.get("token_type_ids") or [0] * len(sample["input_ids"])
    slots = list(zip(sample.sequence_ids(), sample["input_ids"], types, strict=True))
    room = max_length - sum(slot is None for slot, _, _ in slots)
    shorter, longer = sorted(map(len, texts))
    longer = shorter if shorter > room else max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room // 2 + room % 2
    kept = (longer, shorter) if len(texts[0]) > len(texts[1]) else (shorter, longer)
    found: list[tuple[int, int]] = []
    for slot, of in itertools.groupby(slots, key=lambda each: each[0]):
        same = list(of)
        if slot is None:
            found += [(token, kind) for _, token, kind in same]
        else:
            own = texts[slot]
            own = own[len(own) - kept[slot] :] if tokenizer.truncation_side == "left" else own[: kept[slot]]
            found += [(token, same[0][2]) for token in own]
    return [token for token, _ in found], [kind for _, kind in found]


def _examples(encoded: Mapping[str, Any], labels: np.ndarray, tokenizer: Any) -> Examples:
    ids = tuple(np.asarray(row, np.int32) for row in encoded["input_ids"])
    if "token_type_ids" in encoded:
        types = tuple(np.asarray(row, np.int32) for row in encoded["token_type_ids"])
    else:
        types = tuple(np.zeros_like(row) for row in ids)
    return Examples(ids, types, labels, tokenizer.pad_token_id or 0)


def tokenize_words(split: Any, words: str, tokenizer: Any, max_length: int, unlabelled: int) -> Examples:
    """Tokenises sentences of words that have a label each, which goes to the first token of its word.

    Args:
      split: a `datasets.Dataset`, or columns by name; "label" holds lists of ids.
      words: the column with lists of words.
      tokenizer: a fast Hugging Face tokenizer, since it has to say which token is of which word.
      max_length: longer rows are cut.
      unlabelled: the label of all other tokens, and of padding.

    Returns:
      The rows in their order; labels are int32 [size, t], t the tokens of the longest row.
    """
    rows = [list(row) for row in split[words]]
    encoded = tokenizer(rows, is_split_into_words=True, truncation=True, max_length=max_length)
    labels = np.full((len(rows), max(map(len, encoded["input_ids"]))), unlabelled, np.int32)
    for i, (row, own) in enumerate(zip(rows, split["label"], strict=True)):
        if not isinstance(own, int | np.number):  # a hidden label
            at = first_tokens(encoded.word_ids(i), len(row))
            labels[i, at[at >= 0]] = np.asarray(own, np.int32)[at >= 0]
    return _examples(encoded, labels, tokenizer)._replace(unlabelled=unlabelled)


def first_tokens(words: Sequence[int | None], n: int) -> np.ndarray:
    """The number of the first token of each of n words, [n]; -1 for a word without one.

    Args:
      words: the number of the word of each token, None for special tokens.
      n: how many words there are.
    """
    found = np.full(n, -1)
    for token, word in enumerate(words):
        if word is not None and found[word] < 0:
            found[word] = token
    return found
