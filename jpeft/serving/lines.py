"""Answers as lines of JSON, CSV or TSV: one for each row, in numbers of seven digits."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

__all__ = ["WRITES", "lines"]

WRITES = (".jsonl", ".csv", ".tsv")
SEPARATOR = ";"  # between the classes of a row, as in the data


def lines(
    kind: str, rows: Sequence[int], logits: Sequence[np.ndarray], labels: Sequence[str], ending: str, head: bool
) -> str:
    """The answers of one kind as text.

    Args:
      kind: a key of `jpeft.data.kinds.KINDS`.
      rows: their numbers.
      logits: [num_labels] of each row; of tagging [words, num_labels], NaN for a word without a token.
      labels: the names of the classes.
      ending: one of `WRITES`.
      head: whether a table starts with its header.
    """
    records = [ANSWERS[kind](np.asarray(own, np.float64), labels) for own in logits]
    if ending == ".jsonl":
        whole = ({"row": n, **record} for n, record in zip(rows, records, strict=True))
        return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in whole)
    text = io.StringIO()
    write = csv.writer(text, delimiter="," if ending == ".csv" else "\t", lineterminator="\n").writerow
    if head:
        write(["row", *HEADS[kind], *(labels if kind in ("classification", "multilabel") else ())])
    for n, record in zip(rows, records, strict=True):
        write([n, *_cells(record)])
    return text.getvalue()


def _classification(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    shares = softmax(logits)
    return {"label": labels[int(logits.argmax())], "probabilities": _named(shares, labels)}


def _regression(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    return {"value": _short(logits[0])}


def _multilabel(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    chosen = [name for name, own in zip(labels, logits, strict=True) if own > 0]
    return {"labels": chosen, "probabilities": _named(expit(logits), labels)}


def _tagging(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    shares = [None if np.isnan(word).any() else softmax(word) for word in logits]
    return {
        "tags": [None if own is None else labels[int(own.argmax())] for own in shares],
        "probabilities": [None if own is None else _short(own.max()) for own in shares],
    }


ANSWERS = {
    "classification": _classification, "regression": _regression, "multilabel": _multilabel, "tagging": _tagging,
}  # fmt: skip
HEADS = {"classification": ["label"], "regression": ["value"], "multilabel": ["labels"], "tagging": ["tags"]}


def _cells(record: dict[str, Any]) -> Iterator[Any]:
    for name, value in record.items():
        if name == "labels":
            yield SEPARATOR.join(value)
        elif name == "tags":
            yield " ".join(tag or "-" for tag in value)
        elif isinstance(value, dict):
            yield from value.values()
        elif name != "probabilities":  # those of words are in JSON lines only
            yield value


def _named(shares: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    return {name: _short(x) for name, x in zip(labels, shares, strict=True)}


def _short(x: Any) -> float:
    return float(f"{x:.7g}")
