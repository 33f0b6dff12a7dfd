"""Tasks of the user's own that are not what a run needs: one line each, before anything trains."""

import dataclasses

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from jpeft import Splits, Task
from jpeft.core.errors import UserError
from jpeft.data import checking

TASK = Task("own", ("text",), ("a", "b"))
ROWS = {"text": ["x", "y"], "label": [0, 1]}


class Scored(Task):
    """A task whose score and loss are given."""

    answer = {"accuracy": 0.5}  # noqa: RUF012

    def score(self, logits, labels):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Correlation(Task):
    def score(self, logits, labels):
        with np.errstate(invalid="ignore"):
            return {"accuracy": float(np.corrcoef(logits.argmax(-1), labels)[0, 1])}


class Scalar(Task):
    def loss(self, logits, labels):
        return logits.mean()


class Broken(Task):
    def loss(self, logits, labels):
        raise ValueError("two\nlines")


def test_tasks_that_can_run():
    checking.check_task(TASK)
    checking.check_task(Task("values", ("a", "b"), (), ("pearson",), "pearson"))
    checking.check_task(Scored("own", ("text",), ("a", "b")))


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (dataclasses.replace(TASK, text="text"), "text must be a tuple of names, got 'text'"),
        (dataclasses.replace(TASK, text=("a", "b", "c")), "text must name one or two columns"),
        (dataclasses.replace(TASK, labels=("a", "a")), "labels must be distinct names"),
        (dataclasses.replace(TASK, labels=(0, 1)), "labels must be distinct names"),
        (dataclasses.replace(TASK, labels=("a",)), "labels must be at least two"),
        (dataclasses.replace(TASK, metrics=("zzz",)), "metric 'zzz' is unknown"),
        (Task("values", ("text",), ()), "metric 'accuracy' is unknown for regression: expected one of 'pearson'"),
        (
            Task("ner", ("text",), ("OTHER", "B-PER"), ("entity_f1",), "entity_f1", kind="tagging"),
            "metric 'entity_f1' needs labels such as O, B-PER and I-PER",
        ),
        (dataclasses.replace(TASK, metrics=()), "metrics must be a tuple of names"),
        (dataclasses.replace(TASK, primary="f1"), "primary 'f1' is not among the metrics accuracy"),
        (Scalar("own", ("text",), ("a", "b")), r"loss must give one number for each example, \[8\], got \[\]"),
        (Broken("own", ("text",), ("a", "b")), "loss fails: ValueError: two lines"),
        (Correlation("own", ("text",), ("a", "b")), "score gives nan for accuracy: .* of equal answers, too"),
    ],
)
def test_tasks_that_cannot(task, says):
    with pytest.raises(UserError, match=says):
        checking.check_task(task)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, "score must give"),
        ({"f1": 1.0}, "score must give"),
        ({"accuracy": float("nan")}, "score gives nan for accuracy"),
        ({"accuracy": "high"}, "score gives 'high'"),
        (KeyError("x"), "score fails: KeyError"),
    ],
)
def test_scores_that_are_none(monkeypatch, answer, says):
    monkeypatch.setattr(Scored, "answer", answer)
    with pytest.raises(UserError, match=says):
        checking.check_task(Scored("own", ("text",), ("a", "b")))


def test_splits_that_can_be_used():
    found = Splits({"train": ROWS, "validation": {**ROWS, "label": np.array([1, 1])}})
    assert checking.check_splits(TASK, found) is found


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_classes_of_a_data_set_are_in_the_order_of_the_task(kind):
    def split(names):
        of = ClassLabel(names=names)
        tagging = kind == "tagging"
        rows = {"text": [["x"]] if tagging else ["x"], "label": [[1]] if tagging else [1]}
        features = (
            {"text": List(Value("string")), "label": List(of)} if tagging else {"text": Value("string"), "label": of}
        )
        return Dataset.from_dict(rows, features=Features(features))

    task = dataclasses.replace(TASK, kind=kind)
    for names in (["A", "b"], ["x", "y"]):
        checking.check_splits(task, Splits({"train": split(names), "validation": split(names)}))
    with pytest.raises(UserError, match="the train split has the classes b, a, and the task a, b: expected the same"):
        checking.check_splits(task, Splits({"train": split(["b", "a"]), "validation": split(["a", "b"])}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label": [0, 7]}, "the validation split, row 1: label 7 is not one of 0 to 1"),
        ({"label": [0.5, 1]}, "row 0: label 0.5 is not one of"),
        ({"label": [True, 1]}, "row 0: label True"),
        ({"label": ["a", 1]}, "row 0: label 'a'"),
        ({"label": [0]}, "as many in each column"),
        ({"text": ["x", None]}, "holds something else than text"),
    ],
)
def test_splits_that_cannot(changes, says):
    with pytest.raises(UserError, match=says):
        checking.check_splits(TASK, Splits({"train": ROWS, "validation": {**ROWS, **changes}}))


def test_a_further_split_may_lack_labels_and_is_checked_like_the_others():
    both = {"train": ROWS, "validation": ROWS}
    checking.check_splits(TASK, Splits({**both, "test": {**ROWS, "label": [-1, 1]}, "unlabelled": {"words": ["x"]}}))
    with pytest.raises(UserError, match="the test split, row 0: label 7"):
        checking.check_splits(TASK, Splits({**both, "test": {**ROWS, "label": [7, 1]}}))
    with pytest.raises(UserError, match="the validation split, row 0: label -1"):
        checking.check_splits(TASK, Splits({**both, "validation": {**ROWS, "label": [-1, 1]}}))


def test_splits_that_fail():
    class Failing(Task):
        def splits(self, path):
            raise KeyError(path)

    with pytest.raises(UserError, match="splits fails: KeyError: 'here'"):
        checking.splits(Failing("own", ("text",), ("a", "b")), "here")


def test_splits_and_columns_that_are_missing():
    with pytest.raises(UserError, match="splits has no 'validation' split"):
        checking.check_splits(TASK, Splits({"train": ROWS}))
    with pytest.raises(UserError, match="the train split has no column 'text'"):
        checking.check_splits(TASK, Splits({"train": {"label": [0]}, "validation": ROWS}))
    with pytest.raises(UserError, match="must give a jpeft Splits, got dict"):
        checking.check_splits(TASK, {"train": ROWS})
    values = {"text": ["x", "y"], "label": [1.0, float("inf")]}
    with pytest.raises(UserError, match="row 1: label inf is not a finite number"):
        checking.check_splits(dataclasses.replace(TASK, labels=()), Splits({"train": values, "validation": values}))
