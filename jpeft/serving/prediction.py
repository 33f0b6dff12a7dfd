"""Logits of texts from trained modules: grouped by length, in compiled batches."""

from collections.abc import Sequence

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.data.batching import Batch, eval_batches, tokenize
from jpeft.data.padding import length_buckets
from jpeft.data.rows import is_unicode
from jpeft.store.modules import Saved
from jpeft.training.step import forward

__all__ = ["predict"]

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
    if not isinstance(texts, Sequence | np.ndarray) or (isinstance(texts, np.ndarray) and not texts.ndim):
        raise UserError(f"expected a list of sentences or pairs, got {type(texts).__name__}")
    width = len(saved.labels) or 1
    if not len(texts):
        return np.zeros((0, width), np.float32)
    columns = _columns(texts, saved.num_texts)
    config = saved.model.config
    split = {**columns, "label": np.zeros(len(texts), np.int32)}
    examples = tokenize(split, tuple(columns), saved.tokenizer, saved.max_length, np.int32)
    logits = np.zeros((len(texts), width), np.float32)
    nothing = {"params": {}, "peft": {}}
    size = min(BATCH_SIZE, len(texts))
    buckets = tuple(min(bucket, config.max_length) for bucket in length_buckets(examples.lengths))
    for batch, rows in eval_batches(examples, size, buckets):
        logits[rows] = _forward(saved.model, saved.transform, nothing, saved.variables, Batch(*batch))[: len(rows)]
    return logits


def _columns(texts: Sequence[str | tuple[str, str]], wanted: int) -> dict[str, list[str]]:
    if isinstance(texts, str):
        raise UserError(f"expected a list of sentences or pairs, got one string: predict(saved, [{texts[:40]!r}])")
    rows = [tuple(row) if isinstance(row, tuple | list) else (row,) for row in texts]
    names = ("sentence1", "sentence2")[:wanted]
    for i, row in enumerate(rows):
        if len(row) != wanted or not all(isinstance(text, str) and is_unicode(text) for text in row):
            what = "a sentence" if wanted == 1 else "a pair of sentences"
            raise UserError(f"text {i}: expected {what}, as in training, got {texts[i]!r:.60}")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
