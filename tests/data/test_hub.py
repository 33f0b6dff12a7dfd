"""Data sets that `datasets` reads, from a local folder in the place of the hub."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from jpeft import UserError
from jpeft.data import hub
from jpeft.data.custom import custom


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    hub._fetched.cache_clear()
    return tmp_path / "cache"


def saved(folder, features, **splits):
    folder.mkdir()
    for name, rows in splits.items():
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def test_ids_of_words_become_names(tmp_path, cache):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-X", "I-X"]))})
    rows = {"tokens": [["a", "dog"], ["cats"]], "ner_tags": [[0, 1], [2]]}
    folder = saved(tmp_path / "ner", features, train=rows, validation={k: v[:1] for k, v in rows.items()})
    files = hub.fetch(folder)
    assert sorted(files) == ["train", "validation"]
    assert [json.loads(line) for line in Path(files["train"]).read_text().splitlines()] == [
        {"tokens": ["a", "dog"], "ner_tags": ["O", "B-X"]}, {"tokens": ["cats"], "ner_tags": ["I-X"]},
    ]  # fmt: skip
    task = custom(files["train"], ("tokens",), "ner_tags", kind="tagging", validation=files["validation"])
    assert (task.labels, task.primary) == (("B-X", "I-X", "O"), "entity_f1")
    hub._fetched.cache_clear()
    assert hub.fetch(folder) == files
    assert {str(path) for path in (cache / "jpeft").iterdir()} == set(files.values())  # named after what is in them


def test_classes_and_hidden_labels(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    train = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    files = hub.fetch(saved(tmp_path / "set", features, train=train, test={"text": ["d"], "label": [-1]}))
    task = custom(files["train"], ("text",), validation=files["train"], test=files["test"])
    assert task.splits().splits["train"]["label"] == [1, 0, 1]
    assert task.splits().splits["test"]["label"] == [-1]


def test_columns_of_text_stay_as_they_are(tmp_path):
    features = Features({"text": Value("string"), "label": Value("string")})
    files = hub.fetch(saved(tmp_path / "set", features, train={"text": ["a \u00e9"], "label": ["x"]}))
    assert Path(files["train"]).read_text(encoding="utf-8") == '{"text":"a \u00e9","label":"x"}\n'


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "no/such"):
        with pytest.raises(UserError, match=f"config.data.hub: cannot load '{name}'") as caught:
            hub.fetch(name)
        assert "\n" not in str(caught.value)
    features = Features({"text": Value("string")})
    with pytest.raises(UserError, match="has no split 'train' for the train: "):
        hub.fetch(saved(tmp_path / "dev", features, validation={"text": ["a"]}))


TEXT = Features({"text": Value("string"), "label": Value("string")})


def lines(file):
    return len(Path(file).read_text().splitlines())


def test_a_folder_whose_files_change_is_read_again(tmp_path):
    """Also where a card names the files, so that the cache of `datasets` does not look into them."""
    folder = tmp_path / "set"
    folder.mkdir()
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.csv\n---\n"
    (folder / "README.md").write_text(card)
    for rows in (3, 5):
        (folder / "rows.csv").write_text("text,label\n" + "a,b\n" * rows)
        assert lines(hub.fetch(str(folder))["train"]) == rows
    hub._fetched.cache_clear()  # as in another process
    assert lines(hub.fetch(str(folder))["train"]) == 5


def test_splits_of_other_names(tmp_path):
    rows = {"text": ["a", "b"], "label": ["x", "y"]}
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "dev", "extra"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": "x"}) + "\n")
    names = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "dev", "extra"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{names}---\n")
    with pytest.raises(UserError, match=r"has no split 'validation' but dev: set config\.data\.validation to one of"):
        hub.fetch(str(folder))
    files = hub.fetch(str(folder), {"validation": "dev"})
    assert json.loads(Path(files["validation"]).read_text())["text"] == "dev"
    assert sorted(files) == ["train", "validation"]
    with pytest.raises(UserError, match="has no split 'deb' for the validation: did you mean 'dev'"):
        hub.fetch(str(folder), {"validation": "deb"})
    plain = hub.fetch(saved(tmp_path / "plain", TEXT, train=rows))  # what is cut off the training rows needs no name
    assert sorted(plain) == ["train"]


def test_small_numbers_keep_their_digits(tmp_path):
    features = Features({"text": Value("string"), "label": Value("float64")})
    files = hub.fetch(saved(tmp_path / "set", features, train={"text": ["a"], "label": [1.5e-11]}))
    assert json.loads(Path(files["train"]).read_text())["label"] == 1.5e-11
