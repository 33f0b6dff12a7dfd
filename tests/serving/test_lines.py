"""Answers of each kind as text, against shares computed by hand."""

import csv
import json
import math

import numpy as np
import pytest

from jpeft.serving.lines import lines

NAMES = ("a", "b", "c")


def share(x):
    return 1 / (1 + math.exp(-x))


def test_a_class_with_the_share_of_each():
    (line,) = lines("classification", [7], [np.array([0.0, 1.0, -1.0])], NAMES, ".jsonl", True).splitlines()
    found, total = json.loads(line), 1 + math.e + 1 / math.e
    assert (found["row"], found["label"]) == (7, "b")
    assert found["probabilities"] == pytest.approx({"a": 1 / total, "b": math.e / total, "c": 1 / math.e / total})


def test_classes_whose_logit_is_above_zero():
    rows = [np.array([0.2, -0.2, 0.0]), np.array([-1.0, -2.0, -3.0]), np.array([900.0, 3.0, -900.0])]
    found = [json.loads(line) for line in lines("multilabel", [1, 2, 3], rows, NAMES, ".jsonl", True).splitlines()]
    assert [row["labels"] for row in found] == [["a"], [], ["a", "b"]]
    assert found[0]["probabilities"] == pytest.approx({"a": share(0.2), "b": share(-0.2), "c": 0.5})
    assert found[2]["probabilities"] == pytest.approx({"a": 1.0, "b": share(3.0), "c": 0.0})


def test_the_tag_of_every_word_that_has_a_token():
    logits = np.array([[0.0, 2.0, 0.0], [np.nan] * 3, [1.0, 0.0, 0.0]])
    (line,) = lines("tagging", [1], [logits], NAMES, ".jsonl", True).splitlines()
    found = json.loads(line)
    assert found["tags"] == ["b", None, "a"]
    first, none, last = found["probabilities"]
    assert none is None
    assert (first, last) == pytest.approx((math.exp(2) / (math.exp(2) + 2), math.e / (math.e + 2)))


@pytest.mark.parametrize(("ending", "mark"), [(".csv", ","), (".tsv", "\t")])
def test_tables_have_one_header(ending, mark):
    given = {
        "classification": ([np.zeros(3)], ["row", "label", "a", "b", "c"], ["1", "a"]),
        "regression": ([np.array([0.5])], ["row", "value"], ["1", "0.5"]),
        "multilabel": ([np.ones(3)], ["row", "labels", "a", "b", "c"], ["1", "a;b;c"]),
        "tagging": ([np.array([[1.0, 0, 0], [np.nan] * 3])], ["row", "tags"], ["1", "a -"]),
    }
    for kind, (logits, head, start) in given.items():
        labels = () if kind == "regression" else NAMES
        texts = (lines(kind, [1], logits, labels, ending, first) for first in (True, False))
        table, rest = (list(csv.reader(text.splitlines(), delimiter=mark)) for text in texts)
        assert table[0] == head
        assert table[1][: len(start)] == start
        assert len(table[1]) == len(head)
        assert rest == table[1:]


def test_numbers_have_seven_digits():
    assert json.loads(lines("regression", [1], [np.array([1 / 3])], (), ".jsonl", True))["value"] == 0.3333333
