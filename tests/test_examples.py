"""The programs under examples/ do what they say, in under 60 lines."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_model(tmp_path, half_optimised):
    assert program("own_model").main(str(tmp_path / "modules.safetensors")) > 0.95


@pytest.fixture
def ratings_model(tmp_path, tiny_model):
    """The tiny model, with the words of the example in the place of its own."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    content = json.loads((folder / "tokenizer.json").read_text())
    words = ["A", *program("own_task").WORDS, "film", "book", "meal", "song", ",", "we", "thought", "."]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {name: i for name, i in vocabulary.items() if i < 4} | {
        w: 4 + i for i, w in enumerate(words)
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_own_task(tmp_path, tiny_config, ratings_model):
    closeness, answers = program("own_task").main(tmp_path / "work", str(ratings_model))
    assert 0.5 < closeness <= 1
    assert set(answers) == {"A superb meal.", "A poor film."}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
