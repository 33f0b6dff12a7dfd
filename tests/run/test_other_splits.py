"""Splits that nothing is chosen by: they are scored once, with what is saved."""

import json

import numpy as np
import pytest
from heard import Heard

import jpeft
from jpeft.data.task import Task, hidden
from jpeft.data.tasks import TASKS
from jpeft.run import experiment

TASK = "stsb"  # whose scores hardly agree by chance, as those of a few classes may


@pytest.fixture
def config(tiny_config, tiny_glue, tmp_path):
    config = tiny_config("lora", TASK, num_epochs=1)
    config.data.path, config.seeds = str(tmp_path / "glue"), (1, 2)
    (tmp_path / "glue" / TASK).mkdir(parents=True)
    for file in (tiny_glue / TASK).iterdir():
        (tmp_path / "glue" / TASK / file.name).write_text(file.read_text())
    return config


def write(config, tmp_path, labels):
    """A test split, some of whose rows are longer than any to train or to choose by."""
    texts = [("the dog sees a tree " * (1 + i % 3), "a cat " * (1 + i % 2)) for i in range(len(labels))]
    rows = [
        {"sentence1": a, "sentence2": b, "label": y, "idx": i}
        for i, ((a, b), y) in enumerate(zip(texts, labels, strict=True))
    ]
    (tmp_path / "glue" / TASK / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts


def test_a_test_split_is_scored_by_what_is_saved(config, tmp_path):
    labels = [0.5, 4.0, 1.5, 3.0, 5.0, 2.5]
    texts, console = write(config, tmp_path, labels), Heard()
    report = experiment.run(config, tmp_path / "work", console)
    assert any("6 of test at the end" in line for line in console.lines)
    logits = [jpeft.predict(jpeft.load(tmp_path / f"work/seed_{seed}/model"), texts) for seed in (1, 2)]
    scores = [TASKS[TASK].score(each, np.array(labels)) for each in logits]
    found = report["other_splits"]["test"]
    assert found["mean"] == pytest.approx({name: (scores[0][name] + scores[1][name]) / 2 for name in scores[0]})
    assert set(found["std"]) == {"pearson", "spearmanr"}
    page = (tmp_path / "work" / "report.md").read_text()
    assert f"| test | {100 * found['mean']['pearson']:.2f} ±" in page


@pytest.mark.parametrize(("labels", "warns"), [([-1.0] * 4, 0), ([0.5, 1.0, -1.0], 1)])
def test_rows_without_labels_are_not_scored(config, tmp_path, labels, warns):
    write(config, tmp_path, labels)
    config.seeds, console = (1,), Heard()
    assert experiment.run(config, tmp_path / "work", console)["other_splits"] == {}
    told = [line for line in console.warnings if "no label" in line]
    assert told == ["1 of 3 rows of test have no label: it is not scored"] * warns


def test_minus_one_may_be_a_value():
    free = Task("own", ("text",), (), ("pearson",), "pearson")
    assert hidden(free, [-1.0, -1.0]) == 2
    assert hidden(free, np.array([[1, 0], [0, -1]])) == 0  # rows of several classes, as NumPy has them
    assert hidden(free, [-1.0, 2.0]) == 0
    assert hidden(TASKS["stsb"], [-1.0, 2.0]) == 1  # from 0 to 5
    assert hidden(TASKS["cola"], [-1, 1]) == 1
