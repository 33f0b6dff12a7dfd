"""The programs under examples/ do what they say, in under 60 lines, and the notebook runs from first to last."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import CHEAP
from nbclient import NotebookClient

from jpeft.workbench import compare

FOLDER = Path(__file__).parents[1] / "examples"


def program(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_own_model(tmp_path, half_optimised):
    assert program("own_model").main(str(tmp_path / "modules.safetensors")) > 0.95


def with_words(tiny_model, folder, words):
    """The tiny model, with these words in the place of its own; some share a token if there are more of them."""
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {name: i for name, i in vocabulary.items() if i < 4} | {
        w: 4 + i % (len(vocabulary) - 4) for i, w in enumerate(words)
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


def test_own_task(tmp_path, tiny_config, tiny_model):
    words = ["A", *program("own_task").WORDS, "film", "book", "meal", "song", ",", "we", "thought", "."]
    model = with_words(tiny_model, tmp_path / "base", words)
    closeness, answers = program("own_task").main(tmp_path / "work", model)
    assert 0.5 < closeness <= 1
    assert set(answers) == {"A superb meal.", "A poor film."}


def test_own_grid():
    grid = program("own_grid").get_config()
    compare.check(grid)
    assert set(grid.variants) == {"LoRA 2", "LoRA 8", "LoRA 32", "BitFit"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def executed(notebook, folder, **environment):
    """Runs all cells in another process, in `folder`, and raises what one of them raises. Returns their texts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "JAX_PLATFORMS": "cpu", **environment}.items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.data["text/plain"] for output in outputs)


def test_the_notebook_runs_on_a_tiny_model(tmp_path, tiny_model):
    notebook = nbformat.read(FOLDER / "own_data.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    words = sorted(set(re.findall(r"[A-Za-z]+|[,;.]", code[0].source)))
    model = with_words(tiny_model, tmp_path / "base", words)
    (where,) = [cell for cell in code if '"minilm"' in cell.source]
    where.source = where.source.replace('"minilm"', repr(model)).replace("max_length=48", "max_length=24")
    text = executed(notebook, tmp_path, XLA_FLAGS=CHEAP)
    assert re.search(r"\| fishpal +\| custom \|", text)
    assert "differs by at most" in text
    assert (tmp_path / "own_data" / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_notebook_says_what_it_shows(tmp_path):
    """The saved outputs are those of these cells, to a point of accuracy."""
    notebook = nbformat.read(FOLDER / "own_data.ipynb", as_version=4)
    saved = "\n".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    score = r"\| fishpal +\| custom \| minilm \| (\S+)"
    before, after = (float(re.search(score, text)[1]) for text in (saved, executed(notebook, tmp_path)))
    assert after == pytest.approx(before, abs=2)
    assert after > 80


def test_the_notebook_is_saved_as_it_ran():
    notebook = nbformat.read(FOLDER / "own_data.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|Users|work)/|site-packages", json.dumps(notebook))
