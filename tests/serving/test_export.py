"""Exports of finished runs: what is written, what it says of itself, and what cannot be written."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import randomised
from safetensors import SafetensorError

import jpeft
from jpeft import export as program
from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data import tokenizer as tokenizers
from jpeft.models import Bert, pretrained
from jpeft.report import tables
from jpeft.run import experiment
from jpeft.run import workdir as workdirs
from jpeft.run.console import Console
from jpeft.serving import card, drift, export
from jpeft.store import adapterhub, huggingface, model_folder, stablehlo
from jpeft.store.adapterhub.format import FLEXIBLE_CLASS
from jpeft.transforms.registry import METHODS

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, by what was asked for."""
    return tmp_path_factory.mktemp("runs"), []


@pytest.fixture
def trained(tiny_config, tmp_path, runs):
    """Makes the workdir of a finished run, a copy of the test's own."""
    folder, made = runs

    def make(method="lora", task="mrpc", seeds=(11,), **options):
        asked = method, task, seeds, options
        if asked not in made:
            config = tiny_config(method, task, num_epochs=1, max_length=8)
            config.seeds = seeds
            config.peft[method].update(options)
            experiment.run(config, folder / str(len(made)), QUIET)
            made.append(asked)
        return shutil.copytree(folder / str(made.index(asked)), tmp_path / "run")

    return make


@pytest.fixture
def fails(capsys):
    """Runs the program, which must fail, and returns its one line."""

    def call(*args):
        assert program.main(["export", *map(str, args)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return call


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_the_exported_model_has_the_logits_of_the_run(trained, tmp_path, form, capsys):
    workdir = trained(seeds=(1, 2))
    report = json.loads((workdir / "report.json").read_text())
    best = max(report["metrics"]["per_seed"], key=lambda row: row["last"]["accuracy"])["seed"]
    output = tmp_path / "out"
    arguments = ["export", "--model", str(workdir), "--format", form, "--output", str(output), "--license", "mit"]
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"seed {best} has the best accuracy" in printed
    assert "in float32, the exported model differs by at most" in printed
    card = (output / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\nbase_model: ')
    assert f"| {best}, this model | " in card
    assert "| bfloat16 | " in card
    assert re.search(r"Modules: lora, rank 2, alpha \d+\.0, targets [^ ]+, ", card)  # defaults among them
    if form == "hf":
        loaded = pretrained.load(output, num_labels=2, key=jax.random.key(0))
        assert loaded.fresh == ()
        config = json.loads((output / "config.json").read_text())
        assert config["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
        assert (output / "tokenizer.json").is_file()
    else:
        assert json.loads((output / huggingface.CONFIG).read_text())["modules_to_save"] == ["classifier"]


PAIRS = [("the dog runs", "a cat"), ("a big tree", "the house sees the dog"), ("the cat", "the cat")]


def test_the_best_epoch_has_its_own_scores(trained, tmp_path, tiny_config):
    """Where the best epoch is what was saved, its scores stand in the card and decide between seeds."""
    config = tiny_config("lora", num_epochs=2, max_length=8)
    config.seeds, config.train.export = (11, 22), "best"
    experiment.run(config, tmp_path / "run", QUIET)
    path = tmp_path / "run" / "report.json"
    report = files.read_record(path, tables.REPORT)
    one, two = report["metrics"]["per_seed"]
    one["last"], one["best"]["accuracy"] = {"accuracy": 0.9, "f1": 0.1}, 0.9
    two["last"], two["best"] = {"accuracy": 0.8, "f1": 0.1}, {"epoch": 1, "accuracy": 0.95, "f1": 0.2}
    files.write_record(path, tables.REPORT, report)
    assert export.find_modules(tmp_path / "run", QUIET).parent.name == "seed_22"
    export.export(tmp_path / "run", "peft", tmp_path / "out", QUIET)
    card = (tmp_path / "out/README.md").read_text()
    assert "| 22, this model | 0.9500 | 0.2000 |" in card
    assert "rows of validation, by which the best epoch was chosen." in card


def test_a_program_serves_what_does_not_merge(trained, tmp_path):
    workdir, output = trained("pfeiffer", bottleneck=4), tmp_path / "out"
    (exact,) = export.export(workdir, "stablehlo", output, QUIET)
    assert (exact.dtype, exact.rows) == ("float32", 18)
    assert exact.largest < 1e-5
    expected = jpeft.predict(jpeft.load(workdir / "seed_11" / "model"), PAIRS)
    # As its card says: without jpeft.
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "jpeft" not in code
    first, second = ([pair[i] for pair in PAIRS] for i in (0, 1))
    code = code.replace("this folder", str(output)).replace('["a sentence"], ["and another"]', f"{first}, {second}")
    found = {}
    exec(code, found)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    # Nor does AdapterHub's library need it merged.
    exact, rough = export.export(workdir, "adapters", tmp_path / "adapters", QUIET)
    assert (exact.dtype, exact.rows, rough.dtype) == ("float32", 18, "bfloat16")
    assert exact.largest < 1e-5
    head = json.loads((tmp_path / "adapters" / adapterhub.HEAD_CONFIG).read_text())
    assert head["label2id"] == {"not_equivalent": 0, "equivalent": 1}
    card = (tmp_path / "adapters/README.md").read_text()
    assert "library_name: adapters" in card
    assert 'model.load_adapter("this folder", set_active=True, use_safetensors=True)' in card


def test_the_card_opens_the_head_with_what_has_a_place_for_it(trained, monkeypatch):
    """A pooler that trained is part of a flexible head, which other classes leave out with no more than a warning."""
    folder = trained("pfeiffer", bottleneck=4) / "seed_11" / "model"
    description, arrays = model_folder.read(folder)

    saved = jpeft.load(folder)

    def page():
        return card.write(folder, "adapters", description, saved, [], "mit")

    assert "model = AutoModelForSequenceClassification.from_pretrained(" in page()
    pooled = {**arrays, "params": {**arrays["params"], "pooler": {}}}
    monkeypatch.setattr(card.model_folder, "read", lambda _: (description, pooled))
    assert f"model = adapters.{FLEXIBLE_CLASS}.from_pretrained(" in page()


# One for each way to act that does not merge.
@pytest.mark.parametrize("name", ["adamix", "ladder_side", "p_tuning", "unipelt"])
def test_a_method_is_a_program_for_any_number_of_rows(tiny_model, tmp_path, name):
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(7))
    model, method = (
        Bert(loaded.config),
        METHODS[name].make(**({"reduction_factor": 4} if name == "ladder_side" else {})),
    )
    sites = jpeft.sites(model, *[jax.ShapeDtypeStruct((1, 5), "int32")] * 2)
    leaves = randomised(jpeft.init(method, jax.random.key(1), sites, loaded.params))
    variables = {"params": loaded.params, "peft": leaves}
    tokenizer = tokenizers.load(tiny_model, loaded.config.vocab_size)
    saved = jpeft.Saved(model, jpeft.chain(method), variables, ("a", "b"), "mrpc", 12, tokenizer, 2, tiny_model, {})
    stablehlo.write(tmp_path, saved)
    program = stablehlo.read(tmp_path)
    run = jax.jit(lambda ids, mask: jpeft.apply(model, method, variables, ids, mask, 0 * ids, mask=mask)[0])
    for shape in ((1, 3), (4, 12)):
        ids = np.random.default_rng(0).integers(4, 18, shape, np.int32)
        mask = np.int32(np.arange(shape[1])[None] < np.arange(2, 2 + shape[0])[:, None])
        expected = run(ids, mask)
        np.testing.assert_allclose(program(ids, mask, np.zeros_like(ids)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"), [(stablehlo.PROGRAM, "is not a program of jax.export"), (stablehlo.WEIGHTS, "not a safetensors")]
)
def test_a_damaged_program_is_refused(trained, tmp_path, name, says):
    output = tmp_path / "out"
    export.export(trained(), "stablehlo", output, QUIET)
    (output / name).write_bytes(b"something else")
    with pytest.raises(UserError, match=says):
        stablehlo.read(output)
    (output / name).unlink()
    with pytest.raises(UserError, match="holds no StableHLO program"):
        stablehlo.read(output)


def test_what_changed_is_measured_by_dtype(trained, tmp_path):
    (folder,) = trained().glob("seed_11/model")
    exact, rough = export.export(folder, "hf", tmp_path / "out", QUIET)
    assert (exact.dtype, rough.dtype) == ("float32", "bfloat16")
    assert exact.largest < 1e-5 < rough.largest < 0.1
    assert exact.changed == 0
    assert exact.rows == 18
    # It is measured on what was written: another head there gives other logits.
    written = tmp_path / "out/model.safetensors"
    tensors, metadata = files.read_safetensors(written)
    files.write_safetensors(written, {**tensors, "classifier.bias": np.array([9, -9], np.float32)}, metadata)
    saved = export.load(folder)
    assert drift.measure(folder, "hf", tmp_path / "out", saved, QUIET)[0].largest > 1


def test_a_regression_has_no_answers_that_change(trained, tmp_path):
    exact, _ = export.export(trained(task="stsb"), "peft", tmp_path / "out", QUIET)
    assert exact.changed is None
    assert exact.largest < 1e-5
    assert "It answers with a number." in (tmp_path / "out/README.md").read_text()


def test_without_the_data_it_is_exported_unmeasured(trained, tmp_path, tiny_glue):
    workdir = trained()
    (folder,) = workdir.glob("seed_11/model")
    alone = tmp_path / "elsewhere" / "model"
    alone.mkdir(parents=True)
    for file in folder.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    console = Console(quiet=True)
    assert export.export(alone, "peft", tmp_path / "out", console) == []
    assert "was not measured" in console.warnings[0]
    assert "What the export changed" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("change", ["fewer rows", "other texts"])
def test_data_that_changed_do_not_pass_for_the_runs_own(trained, tiny_config, tiny_glue, tmp_path, monkeypatch, change):
    workdir, console = trained(), Console(quiet=True)
    config = workdirs.read_config(workdir)
    file = shutil.copytree(tiny_glue, tmp_path / "glue") / "mrpc" / "validation.jsonl"
    rows = file.read_text()
    file.write_text("".join(rows.splitlines(True)[:-1]) if change == "fewer rows" else rows.replace("dog", "cat"))
    config.data.path = str(tmp_path / "glue")
    monkeypatch.setattr(workdirs, "read_config", lambda _: config)
    assert export.export(workdir, "peft", tmp_path / "out", console) == []
    assert "was not measured" in console.warnings[0]
    assert "the evaluation data" in console.warnings[0]


def disk_is_full(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_cannot_be_exported(trained, tmp_path, fails, monkeypatch):
    workdir = trained("pfeiffer", bottleneck=4)
    out = tmp_path / "out"
    to = ("--model", workdir, "--output", out)
    assert "pfeiffer_0 cannot be merged" in fails(*to, "--format", "hf")
    assert "peft has no pfeiffer" in fails(*to, "--format", "peft")
    assert "--format 'onxn' is unknown" in fails(*to, "--format", "onxn")
    assert not out.exists()
    monkeypatch.setattr("safetensors.numpy.save_file", disk_is_full)
    assert "cannot write" in fails(*to, "--format", "adapters")
    assert not out.exists()  # or the same command would be refused
    (tmp_path / "loop").symlink_to("loop")
    assert "neither a folder of" in fails("--model", tmp_path / "loop", "--output", out, "--format", "hf")
    assert "the following arguments are required: --format" in fails(*to)
    assert "neither a folder of trained modules" in fails("--model", tmp_path, "--output", out, "--format", "hf")
    (out / "x").mkdir(parents=True)
    assert "is there already" in fails(*to, "--format", "hf")


def test_the_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        program.main(["export", "--help"])
    printed = capsys.readouterr().out
    assert all(f"{form}: " in printed for form in export.FORMATS)


@pytest.mark.slow
def test_gates_of_adapterhub_average_over_padding_and_the_card_says_so(trained, tmp_path):
    console = Console(quiet=True)
    workdir = trained("unipelt", num_virtual_tokens=2, mlp_hidden=4, reduction_factor=4, rank=2)
    export.export(workdir, "adapters", tmp_path / "out", console)
    assert card.PADDING in console.warnings
    assert f"Note: {card.PADDING}.\n" in (tmp_path / "out/README.md").read_text()


def test_answers_that_an_export_changes_are_counted(trained, tmp_path):
    (folder,) = trained().glob("seed_11/model")
    export.export(folder, "hf", tmp_path / "out", QUIET)
    written, saved = tmp_path / "out/model.safetensors", export.load(folder)
    tensors, metadata = files.read_safetensors(written)
    changed = []
    for bias in ((9, -9), (-9, 9)):  # every row is answered with one class, then with the other
        files.write_safetensors(written, {**tensors, "classifier.bias": np.array(bias, np.float32)}, metadata)
        changed.append(drift.measure(folder, "hf", tmp_path / "out", saved, QUIET)[0].changed)
    said = files.read_leaves(folder.parent / "predictions.safetensors")["logits"].argmax(1)
    assert changed == [int((said == 1).sum()), int((said == 0).sum())]


def test_a_card_does_not_say_where_things_lie():
    line = "jpeft --config lora,mrpc --workdir /home/me/runs/a '--config.data.train=/data/x y/a b.csv' --config.x=a/b"
    assert card._without_places(line) == (
        "jpeft --config lora,mrpc --workdir a '--config.data.train=a b.csv' --config.x=a/b"
    )
