"""GLUE submissions: each file has the model's own answers in the order of the test set."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from heard import Heard

import jpeft
from jpeft import submit as program
from jpeft.core.errors import UserError
from jpeft.run import experiment
from jpeft.serving import submission

SIZE = 7
TEXTS = [(f"the {'dog' if i % 2 else 'cat'} runs", "a tree " * (1 + i % 3)) for i in range(SIZE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_glue):
    """Test sets whose rows are not in order, as files in the wild are."""
    folder = shutil.copytree(tiny_glue, tmp_path_factory.mktemp("with_tests") / "glue")
    for task, hidden in (("mrpc", -1), ("stsb", -1.0)):
        rows = [{"sentence1": a, "sentence2": b, "label": hidden, "idx": i} for i, (a, b) in enumerate(TEXTS)]
        text = "".join(json.dumps(row) + "\n" for row in [*rows[3:], *rows[:3]])
        (folder / task / "test.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def models(tiny_config, folder, once):
    for task in ("mrpc", "stsb"):
        if not (once / task / "report.json").is_file():
            config = tiny_config("lora", task, num_epochs=1)
            config.data.path = str(folder)
            experiment.run(config, once / task, Heard())
    return [once / "mrpc", once / "stsb" / "seed_11" / "model"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(submission, "FILES", tuple(file._replace(rows=SIZE) for file in submission.FILES))


def test_answers_are_the_models_own_in_order(models, folder, tmp_path, small, capsys):
    output = tmp_path / "glue.zip"
    assert program.main(["submit", "--model", *map(str, models), "--output", str(output)]) == 0
    assert "no answers for CoLA, SST-2, QQP, MNLI-m" in capsys.readouterr().out
    with zipfile.ZipFile(output) as archive:
        assert archive.namelist() == ["MRPC.tsv", "STS-B.tsv"]
        pages = [archive.read(name).decode().splitlines() for name in archive.namelist()]
    for page, model in zip(pages, (models[0] / "seed_11" / "model", models[1]), strict=True):
        assert page[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in page[1:]] == [str(i) for i in range(SIZE)]
        logits = jpeft.predict(jpeft.load(model), TEXTS)
        values = [float(line.split("\t")[1]) for line in page[1:]]
        expected = logits.argmax(1) if logits.shape[1] == 2 else logits[:, 0].clip(0, 5)
        np.testing.assert_allclose(values, expected, atol=1e-4)


def test_names_stand_where_the_server_wants_names(models):
    saved = jpeft.load(models[1])._replace(labels=("entailment", "not_entailment"))
    logits = np.array([[1.0, 2.0], [3.0, 0.0]])
    by_task = {file.task: submission._page(file, saved, logits) for file in submission.FILES}
    assert by_task["rte"] == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert by_task["wnli"] == "index\tprediction\n0\t1\n1\t0\n"


def test_ax_is_left_out_where_it_is_missing(folder):
    console = Heard()
    ax = next(file for file in submission.FILES if file.task == "ax")
    assert ax.trained == "mnli"
    assert submission._texts(ax, str(folder), console) is None
    assert "AX is left out" in console.warnings[0]


@pytest.mark.parametrize(
    ("names", "output", "says"),
    [
        ("mrpc", "glue.tsv", "ends in .zip"),
        ("mrpc", "none/glue.zip", "there is no folder"),
        ("mrpc", "glue.zip", "the test split of mrpc has 7 rows, GLUE's has 1,725"),
        ("mrpc mrpc", "glue.zip", "both of 'mrpc'"),
        ("nothing", "glue.zip", "neither a folder of trained modules nor"),
    ],
)
def test_what_cannot_be_submitted(models, once, tmp_path, names, output, says):
    with pytest.raises(UserError, match=says):
        submission.submit([once / name for name in names.split()], tmp_path / output, Heard())
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_task_of_that_name(models, once):
    saved = jpeft.load(once / "mrpc" / "seed_11" / "model")
    submission._check("mrpc", saved)
    with pytest.raises(UserError, match="answers with equivalent, not_equivalent, GLUE's mrpc has not_equiv"):
        submission._check("mrpc", saved._replace(labels=saved.labels[::-1]))


def test_rows_that_are_not_numbered_through(models, once, folder, tmp_path, small):
    broken = shutil.copytree(folder, tmp_path / "glue")
    file = broken / "mrpc" / "test.jsonl"
    file.write_text(file.read_text().replace('"idx": 3', '"idx": 4'))
    with pytest.raises(UserError, match="idx must number the rows from 0 to 6"):
        submission.submit([once / "mrpc"], tmp_path / "x.zip", Heard(), str(broken))
