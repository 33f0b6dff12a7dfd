"""Logits of texts from trained modules: grouped by length, in compiled batches."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.data.batching import Batch, Examples, eval_batches, tokenize
from jpeft.data.padding import length_buckets
from jpeft.data.rows import is_unicode
from jpeft.store.modules import Saved
from jpeft.training.step import forward

__all__ = ["batches", "check_list", "predict", "tokenized"]

BATCH_SIZE = 32

# One program for each model, transform and shape of a batch: the next call finds it compiled.
_forward = jax.jit(forward, static_argnums=(0, 1))


def predict(saved: Saved, texts: Sequence[str | tuple[str, str]]) -> np.ndarray:
    """Computes logits of sentences or sentence pairs.

    Rows are sorted by length into batches of at most 32 with at most four padded lengths. Each shape is compiled once;
    later calls with the same `saved` reuse it.

    Args:
      saved: from `jpeft.load`.
      texts: sentences, or pairs of them; longer inputs are cut as in training.

    Returns:
      Float32 logits [n, num_labels], in the order of `texts`.

    Raises:
      UserError: if `texts` is a single string, mixes sentences with pairs, or holds sentences although the model was
        trained on pairs, or the reverse.
    """
    if not isinstance(saved, Saved):
        raise UserError(f"expected what jpeft.load returns, got {type(saved).__name__}")
    width = len(saved.labels) or 1
    examples = tokenized(saved, texts)
    if not examples.size:
        return np.zeros((0, width), np.float32)
    logits = np.zeros((examples.size, width), np.float32)
    nothing = {"params": {}, "peft": {}}
    for batch, rows in batches(examples, saved.model.config.max_length):
        logits[rows] = _forward(saved.model, saved.transform, nothing, saved.variables, batch)[: len(rows)]
    return logits


def tokenized(saved: Saved, texts: Sequence[str | tuple[str, str]], numbers: Sequence[int] | None = None) -> Examples:
    """The tokens of sentences or pairs, cut as in training.

    Args:
      saved: from `jpeft.load`.
      texts: sentences, or pairs of them.
      numbers: of the texts, for error messages, if they are part of a longer list.

    Raises:
      UserError: as `predict`.
    """
    columns = _columns(texts, saved.num_texts, numbers)
    labels = np.zeros(len(texts), np.int32)
    return tokenize({**columns, "label": labels}, tuple(columns), saved.tokenizer, saved.max_length, np.int32)


def batches(examples: Examples, longest: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields batches of few shapes, none longer than the model takes, and the rows that each holds."""
    buckets = tuple(min(bucket, longest) for bucket in length_buckets(examples.lengths))
    for batch, rows in eval_batches(examples, min(BATCH_SIZE, examples.size), buckets):
        yield Batch(*batch), rows


def check_list(texts: object) -> None:
    """Raises a UserError if texts do not come in a list."""
    if isinstance(texts, str):
        raise UserError(f"expected a list of sentences or pairs, got one string: predict(saved, [{texts[:40]!r}])")
    if not isinstance(texts, Sequence | np.ndarray) or (isinstance(texts, np.ndarray) and not texts.ndim):
        raise UserError(f"expected a list of sentences or pairs, got {type(texts).__name__}")


def _columns(
    texts: Sequence[str | tuple[str, str]], wanted: int, numbers: Sequence[int] | None
) -> dict[str, list[str]]:
    check_list(texts)
    rows = [tuple(row) if isinstance(row, tuple | list) else (row,) for row in texts]
    names = ("sentence1", "sentence2")[:wanted]
    for i, row in enumerate(rows):
        if len(row) != wanted or not all(isinstance(text, str) and is_unicode(text) for text in row):
            what = "a sentence" if wanted == 1 else "a pair of sentences"
            raise UserError(
                f"text {numbers[i] if numbers else i}: expected {what}, as in training, got {texts[i]!r:.60}"
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
