"""Predictions for files: the run's own logits, in the order of the rows, whatever happens on the way."""

import fcntl
import importlib
import io
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import jpeft
from jpeft.core import files
from jpeft.run import experiment
from jpeft.run.console import Console
from jpeft.run.stopping import Stopped
from jpeft.serving import stream
from jpeft.store import model_folder

QUIET = Console(quiet=True)
PROGRAM = runpy.run_path(str(Path(jpeft.__file__).with_name("predict.py")))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def workdir(tiny_config, once):
    if not (once / "report.json").is_file():
        experiment.run(tiny_config("lora", num_epochs=1, max_length=12), once, QUIET)
    return once


@pytest.fixture
def source(tiny_glue):
    return tiny_glue / "mrpc" / "validation.jsonl"


@pytest.fixture
def fails(workdir, tmp_path, capsys):
    """Runs the program, which must fail, and returns its one line."""

    def call(**changes):
        given = {"model": workdir, "output": tmp_path / "out.jsonl", **changes}
        assert PROGRAM["main"](["predict", *(f"--{name}={value}" for name, value in given.items())]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_run(workdir, source, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["predict", "--model", str(workdir), "--input", str(source), "--output", str(output)]
    assert PROGRAM["main"](arguments) == 0
    assert "18 rows answered" in capsys.readouterr().out
    logits = files.read_leaves(workdir / "seed_11" / experiment.PREDICTIONS)["logits"]
    names = ("not_equivalent", "equivalent")
    for number, (row, shares) in enumerate(zip(read(output), jax.nn.softmax(logits), strict=True), start=1):
        assert row["row"] == number
        assert row["label"] == names[int(shares.argmax())]
        np.testing.assert_allclose([row["probabilities"][name] for name in names], shares, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_regression_has_values(tiny_config, tiny_glue, tmp_path):
    experiment.run(tiny_config("lora", "stsb", num_epochs=1, max_length=8), tmp_path / "run", QUIET)
    source, output = tiny_glue / "stsb" / "validation.jsonl", tmp_path / "out.csv"
    stream.predict(tmp_path / "run", str(source), output, QUIET)
    logits = files.read_leaves(tmp_path / "run" / "seed_11" / experiment.PREDICTIONS)["logits"]
    head, *lines = output.read_text().splitlines()
    assert head == "row,value"
    np.testing.assert_allclose([float(line.split(",")[1]) for line in lines], logits[:, 0], rtol=1e-5)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", "-"])
def test_every_kind_of_file_gives_the_same(workdir, source, tmp_path, monkeypatch, ending):
    stream.predict(workdir, str(source), tmp_path / "expected.jsonl", QUIET)
    rows, file = read(source), tmp_path / f"rows{ending}"
    if ending == "-":
        monkeypatch.setattr(stream.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(source.read_bytes())))
    elif ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        separator = {".csv": ",", ".tsv": "\t"}[ending]
        file.write_text("".join(separator.join(map(str, row)) + "\n" for row in [rows[0], *(r.values() for r in rows)]))
    given = ending if ending == "-" else str(file)
    stream.predict(workdir, given, tmp_path / "found.jsonl", QUIET)
    assert (tmp_path / "found.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables_hold_what_json_lines_hold(workdir, source, tmp_path, ending, separator):
    for name in ("out.jsonl", f"out{ending}"):
        stream.predict(workdir, str(source), tmp_path / name, QUIET)
    head, *lines = (line.split(separator) for line in (tmp_path / f"out{ending}").read_text().splitlines())
    assert head == ["row", "label", "not_equivalent", "equivalent"]
    for fields, row in zip(lines, read(tmp_path / "out.jsonl"), strict=True):
        assert fields == [str(row["row"]), row["label"], *map(str, row["probabilities"].values())]


def test_rows_that_cannot_be_read_are_listed_and_the_rest_goes_on(workdir, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 3)
    lines = source.read_bytes().splitlines()[:8]
    bad = {
        1: b'{"sentence1": null, "sentence2": "a"}',
        3: b"[1]",
        5: b'{"sentence1": "the dog"}',
        6: b'{"sentence1": 1, "sentence2": "a"}',
        7: b'"\xff"',
    }
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b"\n".join(bad.get(number, line) for number, line in enumerate(lines, start=1)))
    console = Console(quiet=True)
    assert stream.predict(workdir, str(file), output, console) == (3, 5)
    assert "5 rows could not be read" in console.warnings[-1]
    listed = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [row["row"] for row in listed] == list(bad)
    for row, says in zip(
        listed,
        ("is None, which is not text", "not a JSON object", "no column 'sentence2'", "not text", "not UTF-8"),
        strict=True,
    ):
        assert says in row["error"]
    stream.predict(workdir, str(source), tmp_path / "whole.jsonl", QUIET)
    whole = read(tmp_path / "whole.jsonl")
    for row in read(output):
        assert row["label"] == whole[row["row"] - 1]["label"]
    assert [row["row"] for row in read(output)] == [2, 4, 8]


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_rows_of_tables_with_too_few_fields_are_listed(workdir, tmp_path, ending, separator):
    rows = [("sentence1", "sentence2"), ("the dog",), ("the dog", "a cat"), ("the", "big", "dog"), ("a cat", "the dog")]
    file, output = tmp_path / f"rows{ending}", tmp_path / "out.jsonl"
    file.write_text("".join(separator.join(row) + "\n" for row in rows))
    assert stream.predict(workdir, str(file), output, QUIET) == (2, 2)
    assert [row["row"] for row in read(output)] == [2, 4]
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [row["row"] for row in errors] == [1, 3]
    assert "1 fields where the header has 2" in errors[0]["error"]


def test_stopped_anywhere_it_ends_the_same(workdir, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 4)
    lines = sorted(source.read_text().splitlines(), key=len)  # what is padded to which length changes on the way
    lines = [*lines, "{", *lines]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    stream.predict(workdir, str(file), tmp_path / "whole.csv", QUIET)
    output, write, evaluate, seen = tmp_path / "out.csv", stream.files.write_record, stream.evaluate, []
    monkeypatch.setattr(stream, "evaluate", lambda *args: seen.append(tuple(args[-1])) or evaluate(*args))
    for survives in (0, 1, 4, 2):  # notes that are made before the process dies, with rows on disk that no note knows

        def dying(*args, left=[survives]):  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(*args)

        with monkeypatch.context() as patched:
            patched.setattr(stream.files, "write_record", dying)
            with pytest.raises(KeyboardInterrupt):
                stream.predict(workdir, str(file), output, QUIET)
    assert stream.predict(workdir, str(file), output, QUIET) == (36, 1)
    assert output.read_text() == (tmp_path / "whole.csv").read_text()
    errors = [tmp_path / f"{name}.csv.errors.jsonl" for name in ("out", "whole")]
    assert errors[0].read_text() == errors[1].read_text()
    assert set(seen) == {(8, 12)}  # or a run that resumes would answer in other digits
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_was_begun_goes_on_with_the_same_only(workdir, source, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(stream, "CHUNK", 4)
    output, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    evaluate = stream.evaluate
    monkeypatch.setattr(stream, "evaluate", lambda *args: 1 / 0 if output.read_text() else evaluate(*args))
    with pytest.raises(ZeroDivisionError):
        stream.predict(workdir, str(source), output, QUIET)
    monkeypatch.setattr(stream, "evaluate", evaluate)
    other.write_text(source.read_text().replace("dog", "cat"))
    assert "was begun with another model, input, columns or device" in fails(input=other)
    kept = output.read_text()
    output.write_text(kept[:-1])
    assert "was cut or deleted since it was begun" in fails(input=source)
    output.write_text(kept)
    with monkeypatch.context() as patched:
        patched.setattr(stream.jax, "default_backend", lambda: "tpu")
        assert "was begun with another model, input, columns or device" in fails(input=source)
    about = workdir / "seed_11" / "model" / "jpeft.json"
    was = files.read_record(about, model_folder.KIND)
    files.write_record(about, model_folder.KIND, was | {"labels": ["a", "b"]})  # the same weights, other names
    assert "was begun with another model, input, columns or device" in fails(input=source)
    files.write_record(about, model_folder.KIND, was)
    output.write_text(kept.replace('"label": "', '"label": "x')[: len(kept)])
    assert "was edited since it was begun" in fails(input=source)
    output.write_text(kept)
    note = tmp_path / ".out.jsonl.progress.json"
    note.write_text(note.read_text().replace('"rows": 4', '"rows": 8'))
    assert "was changed or damaged" in fails(input=source)


def test_what_cannot_be_done_is_one_line(workdir, source, tmp_path, fails):
    assert "there is no file nowhere.csv" in fails(input="nowhere.csv")
    assert "is of an unknown kind: expected .jsonl" in fails(input=__file__)
    assert "is neither a folder of trained modules nor the workdir" in fails(input=source, model=tmp_path)
    assert ".jsonl" in fails(input=source, output=tmp_path / "out.json")
    assert "no column 'sentence'; did you mean" in fails(input=source, text="sentence,sentence2")
    assert "--text must name 2 columns, as in training" in fails(input=source, text="sentence1")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n[]\n")
    assert "none of the 2 rows could be read" in fails(input=broken, output=tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl has no rows" in fails(input=empty)
    (tmp_path / "out.jsonl").write_text("mine")
    assert "is there already" in fails(input=source)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_one_process_writes_an_output(workdir, source, tmp_path, fails):
    with (tmp_path / ".out.jsonl.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process writes" in fails(input=source)
    stream.predict(workdir, str(source), tmp_path / "out.jsonl", QUIET)


def test_a_file_system_without_locks(workdir, source, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    stream.predict(workdir, str(source), tmp_path / "out.jsonl", QUIET)
    assert len(read(tmp_path / "out.jsonl")) == 18


def test_what_fails_before_its_first_answer_is_in_nobodys_way(workdir, source, tmp_path, monkeypatch, fails):
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(stream, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.predict(workdir, str(source), output, QUIET)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(source.read_text().splitlines(keepends=True)[:5]))
    assert stream.predict(workdir, str(other), output, QUIET) == (5, 0)
    assert len(read(output)) == 5


def test_rows_without_text_are_counted(workdir, tmp_path, capsys):
    (tmp_path / "in.tsv").write_text("sentence1\tsentence2\nthe dog\ta cat\n\ta cat\nthe dog\t \n")
    given = ["--model", str(workdir), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.tsv")]
    assert PROGRAM["main"](["predict", *given]) == 0
    assert "2 rows with an empty text got an answer like any other" in "".join(capsys.readouterr())


def test_answers_that_are_not_finite_are_one_line(workdir, source, monkeypatch, fails):
    monkeypatch.setattr(stream, "evaluate", lambda *_: np.full((18, 2), np.nan, np.float32))
    assert fails(input=source) == "the model's answers are not finite"


def test_columns_of_the_standard_input_are_checked(source, monkeypatch, fails):
    for text, says in (("sentence,sentence2", "no column 'sentence'"), ("sentence1,sentence2", "is there already")):
        monkeypatch.setattr(stream.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(source.read_bytes())))
        assert says in fails(input="-", text=text)


def test_asked_to_stop_it_is_not_a_success(workdir, source, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("")

    monkeypatch.setattr(stream, "evaluate", stopped)
    arguments = ["predict", f"--model={workdir}", f"--input={source}", f"--output={tmp_path / 'out.jsonl'}"]
    with pytest.raises(SystemExit, match=r"stopped: .*out\.jsonl is not whole"):
        PROGRAM["main"](arguments)


def test_a_task_of_ones_own_knows_its_columns(tiny_config, tmp_path, source, monkeypatch):
    config = tiny_config("lora", "custom", num_epochs=1, max_length=8)
    config.data.update(path=None, train=str(source), text=("sentence2",), validation_fraction=0.3)
    experiment.run(config, tmp_path / "run", QUIET)
    stream.predict(tmp_path / "run", str(source), tmp_path / "out.jsonl", QUIET)
    assert {row["label"] for row in read(tmp_path / "out.jsonl")} <= {"0", "1"}
    monkeypatch.chdir(tmp_path / "run" / "seed_11")
    stream.predict(Path("model"), str(source), tmp_path / "relative.jsonl", QUIET)
    Path("model").rename(tmp_path / "model")  # without its run
    with pytest.raises(jpeft.UserError, match=r"name the columns with text, as in --text sentence1$"):
        stream.predict(tmp_path / "model", str(source), tmp_path / "other.jsonl", QUIET)


def test_the_program_does_not_stand_in_the_place_of_the_function():
    with pytest.raises(ImportError, match=r"python -m jpeft\.predict"):
        importlib.import_module("jpeft.predict")
    assert callable(jpeft.predict)
