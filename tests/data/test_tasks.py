import gzip
import json
import os
import time

import pytest

from jpeft.core.errors import UserError
from jpeft.data import tasks
from jpeft.data.tasks import TASKS, load

ROWS = [{"sentence": "Fine.", "label": 1, "idx": 5}, {"sentence": 'Bad\tis, "this".', "label": 0, "idx": 6}]
HUB_SIZES = {
    "cola": {"train": 8551, "validation": 1043, "test": 1063},
    "sst2": {"train": 67349, "validation": 872, "test": 1821},
    "mrpc": {"train": 3668, "validation": 408, "test": 1725},
    "stsb": {"train": 5749, "validation": 1500, "test": 1379},
    "wnli": {"train": 635, "validation": 71, "test": 146},
    "ax": {"test": 1104},
    "mnli": {"validation_matched": 9815},
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(home, **files):
    """Writes files named like train_jsonl; None leaves one out."""
    home.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        split, _, ending = name.rpartition("_")
        if text is not None:
            (home / f"{split}.{ending}").write_text(text, encoding="utf-8")


@pytest.fixture
def cola(tmp_path):
    write(tmp_path / "cola", train_jsonl=lines(ROWS), validation_jsonl=lines(ROWS))
    return tmp_path


def fails(path, name="cola"):
    with pytest.raises(UserError) as caught:
        load(name, path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load_a_folder(cola):
    found = load("cola", cola)
    assert {k: list(v) for k, v in found.splits.items()} == {"train": ROWS, "validation": ROWS}
    assert found.absent == ("test",)
    assert found.empty_texts == {}
    assert found.source == str(cola)


def test_the_environment_names_the_folder_and_an_argument_wins(cola, monkeypatch, tmp_path):
    monkeypatch.setenv("JPEFT_GLUE_DIR", str(cola))
    assert load("cola").source == str(cola)
    assert "nowhere" in fails(tmp_path / "nowhere")


def test_every_file_type_reads_the_same(tmp_path):
    from datasets import Dataset

    home = tmp_path / "cola"
    home.mkdir()
    (home / "train.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    Dataset.from_list(ROWS).to_parquet(home / "validation.parquet")
    (home / "test.csv").write_text('sentence,label,idx\nFine.,1,5\n"Bad\tis, ""this"".",0,6\n', encoding="utf-8-sig")
    found = load("cola", tmp_path).splits
    assert [list(split) for split in found.values()] == [ROWS] * 3


def test_tsv_knows_no_quotes_and_csv_may_break_lines(tmp_path):
    write(
        tmp_path / "cola",
        train_tsv='sentence\tlabel\n"Unbalanced, he said\t1\nA ""b\t0\n',
        validation_csv='sentence,label\n"Two\nlines",1\nOne,0\n',
    )
    found = load("cola", tmp_path).splits
    assert list(found["train"]["sentence"]) == ['"Unbalanced, he said', 'A ""b']
    assert list(found["train"]["idx"]) == [0, 1]
    assert list(found["validation"]["sentence"]) == ["Two\nlines", "One"]


@pytest.mark.parametrize("label", [2, -1, "yes", 0.5, None, float("nan"), float("inf"), 10**400, [1]])
def test_a_label_outside_the_set_names_file_and_row(cola, label):
    write(cola / "cola", train_jsonl=lines([*ROWS, ROWS[0] | {"label": label}]))
    message = fails(cola)
    assert "train.jsonl, row 3: label" in message
    assert "0 (unacceptable), 1 (acceptable)" in message


@pytest.mark.parametrize("label", [-1.0, -0.1, 5.1, "high", float("nan"), "1_0"])
def test_regression_labels_lie_in_their_range(tmp_path, label):
    row = {"sentence1": "a", "sentence2": "b", "label": 5}
    write(tmp_path / "stsb", train_jsonl=lines([row]), validation_jsonl=lines([row, row | {"label": label}]))
    assert "validation.jsonl, row 2: label" in fails(tmp_path, "stsb")


def test_labels_are_hidden_in_test_splits_only(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": 2}
    unlabelled = {"sentence1": "a", "sentence2": "b"}
    write(
        tmp_path / "stsb",
        train_jsonl=lines([row]),
        validation_jsonl=lines([row]),
        test_jsonl=lines([row | {"label": -1.0}, unlabelled]),
    )
    found = load("stsb", tmp_path)
    assert list(found.splits["test"]["label"]) == [-1.0, -1.0]
    assert found.splits["train"].features["label"].dtype == "float64"
    assert found.absent == ()


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"train_jsonl": lines([{"sentense": "a", "label": 1}])}, ["train.jsonl, row 1", "'sentence'", "'sentense'"]),
        ({"train_jsonl": lines([{"sentence": "a"}])}, ["train.jsonl, row 1", "'label'"]),
        ({"train_jsonl": lines(ROWS) + "{oops\n"}, ["train.jsonl, row 3", "not JSON"]),
        ({"train_jsonl": "[1, 2]\n"}, ["train.jsonl, row 1", "not a JSON object"]),
        ({"train_jsonl": lines([{"sentence": 3, "label": 1}])}, ["train.jsonl, row 1", "not text"]),
        ({"train_jsonl": ""}, ["train.jsonl has no rows"]),
        ({"train_jsonl": None}, ["no 'train' split", "train.jsonl", "train.tsv.gz"]),
        ({"train_jsonl": None, "train_csv": "sentence,label\na,1\nb\n"}, ["train.csv, row 2", "1 fields"]),
        ({"train_jsonl": None, "train_csv": 'sentence,label\na,1\n"b"c,1\n'}, ["train.csv, row 2"]),
        ({"train_jsonl": None, "train_tsv": "sentence\tlabel\na\tb\t1\n"}, ["train.tsv, row 1", "3 fields"]),
        ({"train_jsonl": None, "train_parquet": "no"}, ["train.parquet", "parquet"]),
    ],
)
def test_unreadable_files_say_where(tmp_path, files, parts):
    write(tmp_path / "cola", **({"train_jsonl": lines(ROWS), "validation_jsonl": lines(ROWS)} | files))
    message = fails(tmp_path)
    assert all(part in message for part in parts), message


def test_bytes_that_are_not_text_say_where(cola):
    (cola / "cola" / "train.jsonl").write_bytes(lines(ROWS).encode() + b'{"sentence": "\xff", "label": 1}\n')
    assert "train.jsonl, line 3: not UTF-8" in fails(cola)
    (cola / "cola" / "train.jsonl").unlink()
    (cola / "cola" / "train.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode())[:-12])
    assert "train.jsonl.gz" in fails(cola)


def test_a_missing_task_folder_names_what_is_there(cola):
    message = fails(cola, "rte")
    assert str(cola / "rte") in message
    assert "expected one of 'cola'" in message


def test_an_unknown_task_names_the_nearest():
    assert "did you mean 'mnli'" in fails(None, "mnly")


def test_empty_texts_are_counted_and_kept(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": 1}
    rows = [row, row | {"premise": " "}, row | {"premise": "", "hypothesis": ""}]
    write(tmp_path / "mnli", train_jsonl=lines(rows), validation_matched_jsonl=lines([row]))
    found = load("mnli", tmp_path)
    assert found.empty_texts == {"train": 2}
    assert found.splits["train"].num_rows == 3
    assert found.absent == ("validation_mismatched", "test_matched", "test_mismatched")


def test_synthetic_is_built_in():
    found = load("synthetic")
    assert {k: v.num_rows for k, v in found.splits.items()} == {"train": 4000, "test": 1000}
    assert set(TASKS["synthetic"].text) | {"label", "idx"} == set(found.splits["train"].column_names)
    assert found.source == "built in"


def test_without_a_hub_the_error_names_both_ways_out(monkeypatch, tmp_path):
    import huggingface_hub
    from datasets import config

    class Unreachable:
        def dataset_info(self, *args, **kwargs):
            raise OSError("no network")

    monkeypatch.delenv("JPEFT_GLUE_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    start = time.monotonic()
    message = fails(None, "rte")
    assert "config.data.path" in message
    assert "JPEFT_GLUE_DIR" in message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_table_of_tasks(task):
    assert TASKS[task.name] is task
    assert task.num_labels == {"stsb": 1, "mnli": 3, "ax": 3, "synthetic": 3}.get(task.name, 2)
    assert not set(task.required_splits) & set(task.optional_splits)
    assert ("train" in task.required_splits) == (task.name != "ax")


def test_a_task_by_name():
    assert tasks.task("rte") is TASKS["rte"]
    with pytest.raises(UserError, match="did you mean 'cola'"):
        tasks.task("colla")


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "wnli", "ax"])
def test_real_data(name):
    folder = os.environ.get("JPEFT_GLUE_DIR")
    if not folder or not os.path.isdir(os.path.join(folder, name)):
        pytest.skip("needs JPEFT_GLUE_DIR, a folder with this task's splits")
    found = load(name)
    sizes = {k: v.num_rows for k, v in found.splits.items()}
    assert HUB_SIZES.get(name, {}).items() <= sizes.items()
    assert found.empty_texts == {}
    labels = set(found.splits[TASKS[name].eval_split]["label"])
    assert labels <= ({-1} if name == "ax" else set(range(len(TASKS[name].labels)))) or name == "stsb"
