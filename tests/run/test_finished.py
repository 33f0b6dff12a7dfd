"""Finished runs, started again, added to, or started from."""

import json
import shutil

import chex
import jax
import pytest
from conftest import all_but_slow
from heard import again, run

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves, write_record
from jpeft.report import plots
from jpeft.run import experiment
from jpeft.run.finished import RESULT, Result, read, save
from jpeft.transforms.registry import METHODS


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder for what the tests of this file need once."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def finished(tiny_config, tmp_path, once, monkeypatch):
    """A finished run, its config, and its files; its picture is drawn by the first run alone."""
    config = tiny_config("lora", num_epochs=2, max_length=8)
    if not (once / "report.json").exists():
        run(config, once)
        assert list(once.glob("*.png"))
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    workdir = tmp_path / "finished"
    shutil.copytree(once, workdir)
    kept = ("model/jpeft.json", "model/modules.safetensors", experiment.PREDICTIONS, "result.json")
    return config, workdir, {name: (workdir / "seed_11" / name).read_bytes() for name in kept}


@pytest.mark.parametrize("name", ["model/jpeft.json", "model/modules.safetensors", experiment.PREDICTIONS])
@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_a_finished_run_makes_again_what_is_gone_or_damaged(finished, name, how):
    config, workdir, kept = finished
    path = workdir / "seed_11" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(kept[name][:-3] + bytes([kept[name][-3] ^ 1]) + kept[name][-2:])
    log = (workdir / "metrics.jsonl").read_text()
    _, console = again(config, workdir)
    assert any("seed 11 is finished, but " in text for text in console.warnings)
    assert path.read_bytes() == kept[name]
    assert (workdir / "metrics.jsonl").read_text() == log  # from the last checkpoint, without a step of training
    _, console = again(config, workdir)
    assert not any("is finished, but" in text for text in console.warnings)
    assert "  seed 11: finished earlier" in console.lines


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"history": []}'])
def test_a_broken_result_is_made_again(finished, text):
    config, workdir, kept = finished
    (workdir / "seed_11" / "result.json").write_text(text)
    report, _ = again(config, workdir)
    assert report["metrics"]["per_seed"][0]["last"]
    assert (workdir / "seed_11" / "model/modules.safetensors").read_bytes() == kept["model/modules.safetensors"]


def test_without_checkpoints_it_is_trained_again(finished):
    config, workdir, kept = finished
    shutil.rmtree(workdir / "seed_11" / "checkpoints")
    shutil.rmtree(workdir / "seed_11" / "model")
    again(config, workdir)
    assert (workdir / "seed_11" / "model/modules.safetensors").read_bytes() == kept["model/modules.safetensors"]


def test_what_belongs_to_another_seed_does_not_pass_for_its_own(finished, tmp_path):
    """Its result, its modules, and its checkpoints."""
    config, workdir, kept = finished
    other = tmp_path / "other"
    theirs = config.copy_and_resolve_references()
    theirs.seeds = (22,)
    run(theirs, other)
    for name in ("result.json", "model", experiment.PREDICTIONS):
        ours = workdir / "seed_11" / name
        shutil.rmtree(ours) if ours.is_dir() else ours.unlink()
        source = other / "seed_22" / name
        shutil.copytree(source, ours) if source.is_dir() else shutil.copyfile(source, ours)
        _, console = again(config, workdir)
        assert any("seed 11 is finished, but" in text for text in console.warnings), name
        for file in ("model/modules.safetensors", experiment.PREDICTIONS):
            assert (workdir / "seed_11" / file).read_bytes() == kept[file]
    (workdir / "seed_11" / "result.json").unlink()
    shutil.rmtree(workdir / "seed_11" / "checkpoints")
    shutil.copytree(other / "seed_22" / "checkpoints", workdir / "seed_11" / "checkpoints")
    with pytest.raises(UserError, match="it is of another run or seed"):
        run(config, workdir)


def test_a_seed_is_added_to_a_finished_run(finished):
    config, workdir, kept = finished
    config.seeds = (11, 22)
    report, console = again(config, workdir)
    assert "  seed 11: finished earlier" in console.lines
    assert [row["seed"] for row in report["metrics"]["per_seed"]] == [11, 22]
    assert {name: (workdir / "seed_11" / name).read_bytes() for name in kept} == kept
    assert jpeft.load(workdir / "seed_22" / "model").task == "mrpc"


def test_a_finished_run_whose_data_changed_says_so(finished, tmp_path, tiny_glue):
    config, workdir, _ = finished
    shutil.copytree(tiny_glue, tmp_path / "glue")
    moved = tiny_glue.rename(tiny_glue.with_name("moved"))
    (tmp_path / "glue").rename(tiny_glue)
    try:
        again(config, workdir)  # the same rows
        lines = (tiny_glue / "mrpc/train.jsonl").read_text().splitlines()
        (tiny_glue / "mrpc/train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        with pytest.raises(UserError, match="the training data: 45 rows, now 44"):
            again(config, workdir)
    finally:
        shutil.rmtree(tiny_glue)
        moved.rename(tiny_glue)


def test_the_report_says_how_the_run_was_made(finished):
    _, workdir, _ = finished
    page = (workdir / "report.md").read_text()
    assert "| train examples | 45 |" in page
    assert "| num epochs | 2 |" in page
    assert "| majority class | " in page


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"history": None}, ": its history is None"),
        ({"history": []}, "$"),
        ({"history": [{}]}, r": it has no history\.0\.step"),
        ({"summary": 3}, ": its summary is 3"),
        ({"parameters": {"head": "x"}}, r": its parameters\.head is 'x'"),
        ({"seconds": {"train": 1.0}}, r": it has no seconds\.evaluate"),
        ({"files": {"a": 1}}, r": its files\.a is 1"),
        ({"more": 1}, "$"),
    ],
)
def test_a_result_that_no_seed_writes(tmp_path, changes, says):
    """Its hash is right: anyone can compute it."""
    row = {"epoch": 1, "step": 3, "train_loss": 0.3, "accuracy": 0.5}
    result = Result([row], "| a |", {"base": 3}, {"train": 1.0, "evaluate": 1}, 3, 3, 10, [], "o", {}, {})
    save(tmp_path / "result.json", result)
    assert read(tmp_path / "result.json") == result
    write_record(tmp_path / "result.json", RESULT, {**result._asdict(), **changes})
    with pytest.raises(UserError, match=f"is not a result of one seed of this version of jpeft{says}"):
        read(tmp_path / "result.json")


@pytest.mark.parametrize("method", all_but_slow(["lora", "full"], ["full"]))
def test_a_run_starts_from_the_modules_of_another(tiny_config, tmp_path, method):
    """At a rate of next to nothing, all but the head ends where the other run ended."""
    first = tiny_config(method, num_epochs=1, max_length=8)
    run(first, tmp_path / "first")
    second = tiny_config(method, num_epochs=1, max_length=8)
    second.task, second.init_from = "stsb", str(tmp_path / "first/seed_11/model")
    second.train.update(learning_rate=1e-12, weight_decay=0.0)
    _, console = again(second, tmp_path / "second")
    assert any("trained on mrpc, with a new head" in line for line in console.lines)
    one, two = (read_leaves(tmp_path / name / "seed_11/model/modules.safetensors") for name in ("first", "second"))
    assert one["params"].pop("classifier")["kernel"].shape != two["params"].pop("classifier")["kernel"].shape
    chex.assert_trees_all_close(one, two, atol=1e-6)
    assert len(jax.tree.leaves(one)) > 0


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("lora", {"rank": 3}, r'holds lora .*, but this run trains lora {"rank": 3}'),
        ("pfeiffer", {}, "holds lora .*, but this run trains pfeiffer"),
    ],
)
def test_other_modules_cannot_be_started_from(finished, tiny_config, tmp_path, method, options, says):
    config = tiny_config(method, num_epochs=1, max_length=8)
    config.peft[method].update(options)
    config.init_from = str(finished[1] / "seed_11" / "model")
    with pytest.raises(UserError, match=says):
        run(config, tmp_path / "other")
    config.init_from = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no trained modules"):
        run(config, tmp_path / "other")  # which nothing was computed in yet


def test_a_body_that_this_run_neither_trains_nor_saves(tiny_config, tmp_path):
    run(tiny_config("full", num_epochs=1, max_length=8), tmp_path / "first")
    config = tiny_config("head", num_epochs=1, max_length=8)
    config.init_from = str(tmp_path / "first/seed_11/model")
    with pytest.raises(UserError, match="trained embeddings, encoder, pooler of the base model, which 'head' neither"):
        run(config, tmp_path / "second")


def test_folded_modules_cannot_be_started_from(tiny_config, tmp_path):
    config = tiny_config("prefix", num_epochs=1, max_length=8)
    run(config, tmp_path / "first")
    config.init_from = str(tmp_path / "first/seed_11/model")
    with pytest.raises(UserError, match="is saved folded"):
        run(config, tmp_path / "second")


@pytest.mark.parametrize("text", [None, "", "[]\n", '{"seed": 11, "epoch": 1}\n'])
def test_a_log_that_lost_its_epochs_gets_them_back(finished, text):
    config, workdir, _ = finished
    path = workdir / "metrics.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    _, console = again(config, workdir)
    assert any("lacked epochs of seed 11" in told for told in console.warnings)
    assert [json.loads(line) for line in path.read_text().splitlines()] == before
    # An epoch that was edited does not stay beside the true one.
    path.write_text(path.read_text().replace('"train_loss": 0.', '"train_loss": 1.', 1))
    again(config, workdir)
    assert sorted(map(str, map(json.loads, path.read_text().splitlines()))) == sorted(map(str, before))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a file"):
        again(config, workdir)


@pytest.mark.parametrize("change", ["twice", "late", "mark", "cut", "others"])
def test_a_log_has_its_lines_once_and_in_their_order(finished, change):
    config, workdir, _ = finished
    path = workdir / "metrics.jsonl"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    changed = {"twice": before * 2, "late": "".join(lines[1:]), "mark": "\ufeff" + before, "cut": lines[0]}
    changed["others"] = before + before.replace('"seed": 11', '"seed": 9')
    path.write_text(changed[change])
    again(config, workdir)
    assert path.read_text() == before


def test_a_report_names_the_rate_of_each_kind_of_module(tiny_config, tmp_path):
    config = tiny_config("head", num_epochs=1, max_length=8)
    config.method = "fishpal"
    config.fishpal.plan = '{"0": [{"method": "lora", "options": {"rank": 2}}], "1": [{"method": "ia3"}]}'
    config.fishpal.learning_rates.lora = 0.05
    report = run(config, tmp_path)
    assert report["learning_rates"] == pytest.approx({"ia3": METHODS["ia3"].learning_rate, "lora": 0.05})
    page = (tmp_path / "report.md").read_text()
    assert "| learning rate of lora | 0.05 |" in page
    assert "| learning rate |" not in page
