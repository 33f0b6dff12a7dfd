"""The programs under examples/ do what they say, in under 60 lines."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_model(tmp_path):
    assert program("own_model").main(str(tmp_path / "modules.safetensors")) > 0.95


def test_own_task(tmp_path, tiny_config, tiny_model):
    closeness, answers = program("own_task").main(tmp_path, str(tiny_model))
    assert 0.5 < closeness <= 1
    assert set(answers) == {"A superb meal.", "A poor film."}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
