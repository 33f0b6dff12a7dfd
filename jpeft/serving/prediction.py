"""Logits of texts, or of their words, from trained modules: grouped by length, in compiled batches."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.data.batching import Batch, Examples
from jpeft.data.encoding import tokenize, tokenize_words
from jpeft.data.kinds import IGNORED, KINDS
from jpeft.data.rows import is_unicode
from jpeft.store.modules import Saved
from jpeft.training.loop import evaluate
from jpeft.training.step import forward
from jpeft.transforms.parts.inputs import lengthens

__all__ = ["BATCH_SIZE", "by_sentence", "check_list", "checked", "encode", "longest", "predict", "shapes"]

BATCH_SIZE = 32
# Lengths that rows are padded to, up to the longest.
FINE = (*range(8, 64, 4), *range(64, 128, 8), *range(128, 256, 16), *range(256, 513, 32))
COARSE = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)

# One program for each model, transform and shape of a batch: the next call finds it compiled.
_forward = jax.jit(forward, static_argnums=(0, 1))


def predict(saved: Saved, texts: Sequence[Any]) -> Any:
    """Computes logits of sentences or sentence pairs, or of the words of sentences.

    Rows are sorted by length into batches of at most 32, whose shapes come from a short list. Each is compiled once;
    later calls with the same `saved` reuse it.

    Args:
      saved: from `jpeft.load`.
      texts: sentences, or pairs of them; longer inputs are cut as in training. Of tagging, lists of words.

    Returns:
      Float32 logits [n, num_labels], in the order of `texts`. Of tagging, a list of n arrays [words, num_labels], with
      NaN for a word that is no token to the tokenizer.

    Raises:
      UserError: if `texts` is a single string, mixes sentences with pairs, or holds sentences although the model was
        trained on pairs, or the reverse; of tagging, if a sentence is longer than the model takes; if the task has its
        own `encode`.
    """
    if not isinstance(saved, Saved):
        raise UserError(f"expected what jpeft.load returns, got {type(saved).__name__}")
    by_token = KINDS[saved.kind].by_token
    rows = checked(saved, texts)
    if not rows:
        return [] if by_token else np.zeros((0, len(saved.labels) or 1), np.float32)
    examples = encode(saved, rows)

    def run(variables: Any, nothing: Any, batch: Batch) -> Any:
        return _forward(saved.model, saved.transform, nothing, variables, batch)

    size, buckets = shapes(len(rows), longest(saved))
    logits = evaluate(run, saved.variables, {"params": {}, "peft": {}}, examples, buckets, size)
    if not by_token:
        return logits
    found = by_sentence(saved, rows, examples, logits)
    for i, own in enumerate(found):
        if isinstance(own, UserError):
            raise UserError(f"text {i}: {own}")
    return found


def shapes(rows: int, longest: int) -> tuple[int, tuple[int, ...]]:
    """The rows of a batch, 1 to 32, and the lengths that it can be padded to; whatever the texts are, the same few.

    Every shape is a program to compile, and each batch takes one. On a CPU, tokens are dear and programs are not; on an
    accelerator it is the reverse.
    """
    ladder = FINE if jax.default_backend() == "cpu" else COARSE
    return 1 << (min(BATCH_SIZE, rows) - 1).bit_length(), (*(x for x in ladder if x < longest), longest)


def longest(saved: Saved) -> int:
    """The tokens that rows are cut to: as in training; of words, which all want a tag, as many as the model takes.

    With virtual tokens a model takes less than its position table says. That a run has room for them was checked.
    """
    most = saved.model.config.max_length
    if KINDS[saved.kind].by_token and not lengthens(saved.variables["peft"]):
        return most
    return min(saved.max_length, most)


def encode(saved: Saved, rows: Sequence[tuple[Any, ...]]) -> Examples:
    """Tokenises rows of texts, (sentence,) or (sentence, sentence), or (list of words,). The labels mean nothing.

    Raises:
      UserError: if the model's task tokenised them in a way of its own.
    """
    if saved.own_encode:
        raise UserError(
            "the task of this model has its own `encode`, which is not saved with it: tokenise as it does and call "
            "jpeft.apply, or, for texts that jpeft's tokens are right for, take saved._replace(own_encode=False)"
        )
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
        told = f"{len(words):,} words are more than {length:,} tokens, the most that this model answers"
        found.append(UserError(told) if cut else own)
    return found


def checked(saved: Saved, texts: Any, numbers: Sequence[int] | None = None) -> list[tuple[Any, ...]]:
    """The rows of texts for `encode`.

    Args:
      saved: see `predict`.
      texts: likewise.
      numbers: of the texts, for error messages, if they are part of a longer list.

    Raises:
      UserError: as `predict`.
    """
    by_token = KINDS[saved.kind].by_token
    check_list(texts, "lists of words" if by_token else "sentences or pairs")
    what = "a list of words" if by_token else "a sentence" if saved.num_texts == 1 else "a pair of sentences"
    found: list[tuple[Any, ...]] = []
    for i, row in enumerate(texts):
        several = isinstance(row, tuple | list)
        parts = tuple(row) if several else (row,)
        right = several and len(parts) > 0 if by_token else len(parts) == saved.num_texts
        if not right or not all(isinstance(x, str) and is_unicode(x) and (x.strip() or not by_token) for x in parts):
            raise UserError(f"text {numbers[i] if numbers else i}: expected {what}, as in training, got {row!r:.60}")
        found.append((list(parts),) if by_token else parts)
    return found


def check_list(texts: object, of: str = "sentences or pairs") -> None:
    """Raises a UserError if texts do not come in a list."""
    if isinstance(texts, str):
        raise UserError(f"expected a list of {of}, got one string: predict(saved, [{texts[:40]!r}])")
    if not isinstance(texts, Sequence | np.ndarray) or (isinstance(texts, np.ndarray) and not texts.ndim):
        raise UserError(f"expected a list of {of}, got {type(texts).__name__}")
