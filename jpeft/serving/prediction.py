"""Logits of texts, or of their words, from trained modules: grouped by length, in compiled batches."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.data.batching import Batch, Examples, tokenize, tokenize_words
from jpeft.data.kinds import IGNORED, KINDS
from jpeft.data.padding import length_buckets
from jpeft.data.rows import is_unicode
from jpeft.store.modules import Saved
from jpeft.training.loop import evaluate
from jpeft.training.step import forward

__all__ = ["by_sentence", "encode", "longest", "predict"]

BATCH_SIZE = 32

# One program for each model, transform and shape of a batch: the next call finds it compiled.
_forward = jax.jit(forward, static_argnums=(0, 1))


def predict(saved: Saved, texts: Sequence[Any]) -> Any:
    """Computes logits of sentences or sentence pairs, or of the words of sentences.

    Rows are sorted by length into batches of at most 32 with at most four padded lengths. Each shape is compiled once;
    later calls with the same `saved` reuse it.

    Args:
      saved: from `jpeft.load`.
      texts: sentences, or pairs of them; longer inputs are cut as in training. Of tagging, lists of words.

    Returns:
      Float32 logits [n, num_labels], in the order of `texts`. Of tagging, a list of n arrays [words, num_labels], with
      NaN for a word that is no token to the tokenizer.

    Raises:
      UserError: if `texts` is a single string, mixes sentences with pairs, or holds sentences although the model was
        trained on pairs, or the reverse; of tagging, if a sentence is longer than the model takes.
    """
    if not isinstance(saved, Saved):
        raise UserError(f"expected what jpeft.load returns, got {type(saved).__name__}")
    by_token = KINDS[saved.kind].by_token
    if not isinstance(texts, Sequence | np.ndarray) or (isinstance(texts, np.ndarray) and not texts.ndim):
        what = "of lists of words" if by_token else "of sentences or pairs"
        raise UserError(f"expected a list {what}, got {type(texts).__name__}")
    if not len(texts):
        return [] if by_token else np.zeros((0, len(saved.labels) or 1), np.float32)
    rows = _sentences(texts) if by_token else _rows(texts, saved.num_texts)
    examples = encode(saved, rows)
    buckets = tuple(min(bucket, saved.model.config.max_length) for bucket in length_buckets(examples.lengths))

    def run(variables: Any, nothing: Any, batch: Batch) -> Any:
        return _forward(saved.model, saved.transform, nothing, variables, batch)

    size, nothing = min(BATCH_SIZE, len(texts)), {"params": {}, "peft": {}}
    logits = evaluate(run, saved.variables, nothing, examples, buckets, size)
    if not by_token:
        return logits
    found = by_sentence(saved, rows, examples, logits)
    for i, own in enumerate(found):
        if isinstance(own, UserError):
            raise UserError(f"text {i}: {own}")
    return found


def longest(saved: Saved) -> int:
    """The tokens that rows are cut to: as in training; of words, which all want a tag, as many as the model takes."""
    most = saved.model.config.max_length
    return most if KINDS[saved.kind].by_token else min(saved.max_length, most)


def encode(saved: Saved, rows: Sequence[tuple[Any, ...]]) -> Examples:
    """Tokenises rows of texts, (sentence,) or (sentence, sentence), or (list of words,). The labels mean nothing."""
    names = ("sentence1", "sentence2")[: saved.num_texts]
    split: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    if not KINDS[saved.kind].by_token:
        split["label"] = [0] * len(rows)
        return tokenize(split, names, saved.tokenizer, longest(saved), np.int32)
    split["label"] = [list(range(len(words))) for words in split[names[0]]]  # which word has its first token where
    return tokenize_words(split, names[0], saved.tokenizer, longest(saved), IGNORED)


def by_sentence(
    saved: Saved, rows: Sequence[tuple[Any, ...]], examples: Examples, logits: np.ndarray
) -> list[np.ndarray | UserError]:
    """The logits of the words of each sentence, [words, num_labels], or why there are not all of them.

    Args:
      saved: see `predict`.
      rows: as for `encode`.
      examples: from it.
      logits: of the words that have a token, one after the other.
    """
    found: list[np.ndarray | UserError] = []
    at = 0
    for (words,), labels, length in zip(rows, examples.labels, examples.lengths, strict=True):
        there = labels[labels != IGNORED]
        own = np.full((len(words), logits.shape[1]), np.nan, np.float32)
        own[there] = logits[at : at + len(there)]
        at += len(there)
        cut = length == longest(saved) and len(words) - 1 not in there
        told = f"{len(words):,} words are more than {length:,} tokens, which is all that the model takes"
        found.append(UserError(told) if cut else own)
    return found


def _rows(texts: Sequence[Any], wanted: int) -> list[tuple[str, ...]]:
    if isinstance(texts, str):
        raise UserError(f"expected a list of sentences or pairs, got one string: predict(saved, [{texts[:40]!r}])")
    rows = [tuple(row) if isinstance(row, tuple | list) else (row,) for row in texts]
    for i, row in enumerate(rows):
        if len(row) != wanted or not all(isinstance(text, str) and is_unicode(text) for text in row):
            what = "a sentence" if wanted == 1 else "a pair of sentences"
            raise UserError(f"text {i}: expected {what}, as in training, got {texts[i]!r:.60}")
    return rows


def _sentences(texts: Sequence[Any]) -> list[tuple[list[str]]]:
    for i, row in enumerate(texts):
        if not isinstance(row, tuple | list) or not row:
            raise UserError(f"text {i}: expected a list of words, as in training, got {row!r:.60}")
        if not all(isinstance(word, str) and word.strip() and is_unicode(word) for word in row):
            raise UserError(f"text {i}: expected a list of words, got {row!r:.60}")
    return [(list(row),) for row in texts]
