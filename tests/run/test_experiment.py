import json
import shutil
from collections import Counter

import chex
import numpy as np
import pytest
from conftest import all_but_slow
from heard import Heard, again, run
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves, read_record
from jpeft.data.tasks import TASKS
from jpeft.plans import fishpal
from jpeft.report import page as pages
from jpeft.report.tables import REPORT as REPORT_KIND
from jpeft.run import experiment, loading, measured
from jpeft.run.seed import begin
from jpeft.training.compiled import Steps
from jpeft.training.step import StepMetrics

REPORT = {
    "task", "method", "model", "split", "primary_metric", "metrics", "parameters", "seconds", "examples_per_second",
    "inference_examples_per_second", "peak_memory_bytes", "learning_rate", "device", "versions", "baseline",
    "examples", "recipe", "warnings", "command", "other_splits", "data",
}  # fmt: skip
PARAMETERS = {
    "base", "head", "trainable", "trainable_percent", "added_at_inference", "added_percent", "module_bytes",
}  # fmt: skip


def check_report(config, workdir, report):
    assert read_record(workdir / "report.json", REPORT_KIND) == report
    assert set(report) - {"choice"} == REPORT
    assert ("choice" in report) == (config.method == "fishpal" and config.fishpal.plan is None)
    assert set(report["parameters"]) == PARAMETERS
    assert set(report["metrics"]) == {"mean", "std", "per_seed"}
    assert set(report["seconds"]) == {"load", "fisher", "compile", "train", "evaluate"}
    assert set(report["versions"]) == {"jpeft", "jax", "flax"}
    assert (report["task"], report["method"], report["model"]) == (config.task, config.method, config.model)
    assert min(report[name] for name in REPORT if name.endswith(("second", "bytes"))) > 0
    assert report["primary_metric"] in report["metrics"]["mean"]
    assert [row["seed"] for row in report["metrics"]["per_seed"]] == list(config.seeds)
    for row in report["metrics"]["per_seed"]:
        assert set(row["best"]) == {"epoch", *report["metrics"]["mean"]}
        assert set(row["last"]) == set(report["metrics"]["mean"])
        assert row["best"][report["primary_metric"]] >= row["last"][report["primary_metric"]]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(Counter((row["seed"], row["step"], "train_loss" in row) for row in rows).values()) == 1
    epochs = Counter(row["seed"] for row in rows if "train_loss" in row)
    assert epochs == dict.fromkeys(config.seeds, config.train.num_epochs)
    for seed in config.seeds:
        folder = workdir / f"seed_{seed}" / "model"
        saved = jpeft.load(folder)
        assert (saved.task, saved.own_encode) == (config.task, False)
        assert np.isfinite(jpeft.predict(saved, [("the dog", "a cat")])).all()
    for row in report["metrics"]["per_seed"]:
        kept = read_leaves(workdir / f"seed_{row['seed']}" / experiment.PREDICTIONS)
        scores = TASKS[config.task].score(np.asarray(kept["logits"]), np.asarray(kept["labels"]))
        assert scores == pytest.approx(row["last"])
    file = workdir / f"seed_{config.seeds[0]}" / "model" / "modules.safetensors"
    assert abs(file.stat().st_size - report["parameters"]["module_bytes"]) < 500


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder for a run that several tests look at, and what it gave."""
    return tmp_path_factory.mktemp("once"), []


@pytest.fixture
def fishpal_run(tiny_config, tmp_path, once):
    """A finished run in a folder of the test's own, with its config, its report and what it said."""
    config = tiny_config("fishpal")
    config.seeds = (1, 2)
    folder, gave = once
    if not gave:
        console = Heard()
        gave += [experiment.run(config, folder, console), console]
    return config, shutil.copytree(folder, tmp_path / "work"), *gave


@pytest.fixture
def untrained(monkeypatch):
    """Runs train in name only: that steps are right is tested elsewhere, and compiling them takes most of the time."""

    def train(state, frozen, batch, key):
        return state._replace(step=state.step + 1), StepMetrics(np.float32(1.0), np.float32(1.0))

    def evaluate(trainable, frozen, batch):
        return np.zeros((len(batch.labels), len(trainable["params"]["classifier"]["bias"])), np.float32)

    monkeypatch.setattr(Steps, "compiled", lambda *_: Steps(train, evaluate))


def test_fishpal(fishpal_run):
    config, workdir, report, console = fishpal_run
    check_report(config, workdir, report)
    assert set(report["metrics"]["std"]) == {"accuracy", "f1"}
    assert None not in report["metrics"]["std"].values()
    assert report["seconds"]["fisher"] > 0
    page = (workdir / "report.md").read_text()
    assert "](choice.png)" in page
    assert pages.page([pages.finished(workdir, "run")]).count("<svg") == 3  # curves, calibration, confusions
    assert (workdir / "choice.png").read_bytes().startswith(b"\x89PNG")
    uniform = 0
    candidates = dict.fromkeys(config.fishpal.candidates)
    for row in report["metrics"]["per_seed"]:
        plan = json.loads((workdir / row["plan"]).read_text())
        assert list(plan) == ["0", "1"]
        measured = json.loads((workdir / f"seed_{row['seed']}" / "choice.json").read_text())
        assert measured["passes"] == 8
        assert measured["factors"] == {name: config.fishpal.factors[name] for name in candidates}
        scores = {int(layer): scores for layer, scores in measured["scores"].items()}
        chosen = fishpal.choose(scores, {name: jpeft.Entry(name) for name in candidates})
        assert [plan[str(layer)][0]["method"] for layer in (0, 1)] == [chosen[layer][0].method for layer in (0, 1)]
        uniform += len({entries[0]["method"] for entries in plan.values()}) == 1
    assert sum("throughout" in warning for warning in console.warnings) == uniform

    # Again in the same workdir: nothing is trained, and nothing changes; a plan that is gone comes back.
    log, plan = (workdir / "metrics.jsonl").read_bytes(), (workdir / "seed_1" / "plan.json").read_text()
    (workdir / "seed_1" / "plan.json").unlink()
    again = Heard()
    repeated = experiment.run(config, workdir, again)
    assert {**repeated, "seconds": 0} == {**report, "seconds": 0}
    assert sum("finished earlier" in line for line in again.lines) == 2
    assert (workdir / "metrics.jsonl").read_bytes() == log
    assert (workdir / "seed_1" / "plan.json").read_text() == plan

    # Another config in the same workdir: refused, naming the fields.
    config.train.num_epochs, config.peft.lora.rank = 3, 1
    with pytest.raises(UserError, match="belongs to another config") as caught:
        run(config, workdir)
    assert "config.train.num_epochs was 2, now 3" in str(caught.value)
    assert "config.peft.lora.rank was 2, now 1" in str(caught.value)


@pytest.mark.parametrize(("method", "task"), [("lora", "mrpc"), ("full", "mrpc"), ("head", "mrpc"), ("lora", "stsb")])
def test_methods(tiny_config, tmp_path, method, task):
    config = tiny_config(method, task)
    report = run(config, tmp_path)
    check_report(config, tmp_path, report)
    counts = report["parameters"]
    width = 1 if task == "stsb" else 2
    assert counts["head"] == 17 * width
    adds = 2 * 2 * (16 * 2 + 2 * 16)  # two sites in two layers, rank 2
    assert counts["trainable"] == counts["head"] + {"lora": adds, "full": counts["base"], "head": 0}[method]
    assert counts["added_at_inference"] == 0  # LoRA merges
    assert report["metrics"]["std"] == dict.fromkeys(report["metrics"]["mean"])
    assert report["primary_metric"] == ("pearson" if task == "stsb" else "accuracy")
    assert "plan" not in report["metrics"]["per_seed"][0]
    assert not (tmp_path / "seed_11" / "plan.json").exists()
    assert "](choice.png)" not in (tmp_path / "report.md").read_text()


def test_a_pooler_that_nobody_trained_is_drawn_by_the_seed_and_trains(tiny_config, tmp_path):
    """Below it, a method finds its places as always, and none in it."""
    config, folder = tiny_config("lora", num_epochs=1), tmp_path / "drawn"
    shutil.copytree(config.model, folder)
    weights = load_file(folder / "model.safetensors")
    pooler = weights["bert.pooler.dense.weight"]
    weights["bert.pooler.dense.bias"] = np.zeros(16, np.float32)
    save_file(weights, folder / "model.safetensors")
    config.model, console = str(folder), Heard()
    data, base, _ = loading.load(config, console)
    assert {"pooler", "classifier"} - set(begin(config, 11, data, base, tmp_path, console).sites) == {"pooler"}
    report = experiment.run(config, tmp_path / "work", console)
    assert report["parameters"]["trainable"] == 34 + 2 * 2 * (16 * 2 + 2 * 16) + 16 * 17
    assert any("so initialised and trained: classifier, pooler" in line for line in console.lines)
    kept = load_file(tmp_path / "work" / "seed_11" / "model" / "modules.safetensors")
    trained = next(x for name, x in kept.items() if "pooler" in name and "kernel" in name)
    assert np.abs(trained - pooler.T).max() > 0.1
    answers = jpeft.predict(jpeft.load(tmp_path / "work" / "seed_11" / "model"), [("the dog runs", "a cat sleeps")])
    assert np.isfinite(answers).all()


def test_a_plan_of_one_method_is_warned_of(tiny_config, tmp_path, untrained):
    plan = tmp_path / "plan.json"
    plan.write_text('{"0": [{"method": "lora"}], "1": [{"method": "lora"}]}')
    config = tiny_config("lora", num_epochs=1)
    config.peft.lora.rank = 8  # the plan brings its own options
    config.method, config.fishpal.plan = "fishpal", str(plan)
    console = Heard()
    report = experiment.run(config, tmp_path / "work", console)
    assert [w for w in console.warnings if "the plan is lora throughout" in w]
    assert report["seconds"]["fisher"] < 1
    assert not (tmp_path / "work" / "choice.png").exists()


def test_max_train_examples(tiny_config):
    console = Heard()
    data, *_ = loading.load(tiny_config("head", max_train_examples=20), console)
    assert (data.train.size, data.dev.size) == (20, 18)
    assert any("20 examples to train on" in line and "18 of validation" in line for line in console.lines)


def test_a_named_plan_for_more_layers_than_there_are(tiny_config, tmp_path):
    config = tiny_config("head")
    config.method, config.fishpal.plan = "fishpal", "thesis_sst2"
    with pytest.raises(UserError, match="the plan names layer 2, but the model has layers 0-1"):
        run(config, tmp_path)


def test_inputs_longer_than_the_model_takes(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"config.train.max_length 64: .* takes at most 32"):
        run(tiny_config("lora", max_length=64), tmp_path)


def test_a_workdir_that_is_a_file(tiny_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file or in one"):
        run(tiny_config("lora"), tmp_path / "file")


# Of each kind of leaves, of options, and of what data decides; that all can be made from a config, the checks say.
OTHERS = (
    "adamix", "bitfit", "dora", "far", "fish", "ladder_side", "p_tuning", "pissa", "prompt", "random_mask", "said",
    "sparse_adapter", "unipelt",
)  # fmt: skip


OPTIONS = {
    "far": {"num_examples": 8},
    "fish": {"ratio": 0.1, "num_examples": 8},
    "magnitude_mask": {"ratio": 0.1},
    "mam": {"num_virtual_tokens": 2, "mlp_hidden": 4, "bottleneck": 4},
    "p_tuning": {"num_virtual_tokens": 2, "hidden": 4},
    "prompt": {"num_virtual_tokens": 2},
    "random_mask": {"ratio": 0.1},
    "sparse_adapter": {"score": "snip"},
    "unipelt": {"num_virtual_tokens": 2, "mlp_hidden": 4, "reduction_factor": 4},
}


SELDOM = ("adamix", "bitfit", "dora", "pissa", "prompt", "random_mask", "said")


@pytest.mark.parametrize("method", all_but_slow([*OTHERS, "ia3+layer_norm"], SELDOM))
def test_every_method_runs_from_its_name_and_is_restored(tiny_config, tmp_path, untrained, method):
    config = tiny_config(method, num_epochs=1, max_length=8)
    if method in OPTIONS:
        config.peft[method].update(OPTIONS[method])
    report = run(config, tmp_path)
    assert report["parameters"]["trainable"] > report["parameters"]["head"]
    assert np.isfinite(list(report["metrics"]["mean"].values())).all()
    saved = jpeft.load(tmp_path / "seed_11" / "model")
    assert jpeft.predict(saved, [("the dog runs", "a cat sleeps")]).shape == (1, 2)
    trained = jpeft.merge(saved.transform, saved.variables["peft"], saved.variables["params"])
    assert (trained.leaves == {}) == (report["parameters"]["added_at_inference"] == 0)


def test_what_data_decided_is_asked_once(tiny_config, tmp_path, monkeypatch, untrained):
    """A run that goes on reads the mask that its first start measured."""
    config = tiny_config("fish", num_epochs=1, max_length=8)
    config.peft.fish.update(ratio=0.1, num_examples=8)
    first = run(config, tmp_path)
    assert "](seed_11/fisher_0.png)" in (tmp_path / "report.md").read_text()
    arrays, about = measured.read(tmp_path / "seed_11" / "fisher_0.safetensors")
    assert (about["num_examples"], about["task"], about["labels"]) == (8, "mrpc", "empirical")
    assert sum(x.size for x in arrays.values()) == first["parameters"]["base"]
    (tmp_path / "seed_11" / "result.json").unlink()
    modules = tmp_path / "seed_11" / "model" / "modules.safetensors"
    kept = modules.read_bytes()
    modules.unlink()
    monkeypatch.setattr(jpeft.core.transform, "prepare", lambda *_: pytest.fail("it looked at the data again"))
    again = run(config, tmp_path)
    assert again["metrics"] == first["metrics"]
    assert modules.read_bytes() == kept


def test_a_plan_that_was_edited_since_is_refused(fishpal_run):
    config, workdir, _, _ = fishpal_run
    path = workdir / "seed_1" / "plan.json"
    plan = json.loads(path.read_text())
    plan["0"] = [{"method": "lora", "options": {"dropout": 0.5}}]
    path.write_text(json.dumps(plan))
    for result in (workdir / "seed_1" / "result.json", None):  # finished, then not
        with pytest.raises(UserError, match="is not the plan that this run began with"):
            run(config, workdir)
        if result is not None:
            result.unlink()
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match=r"plan\.json is not a file: delete it"):
        run(config, workdir)


def test_seeds_that_train_together_end_as_they_do_alone(tiny_config, tmp_path):
    """Each with its own head, leaves, order, dropout, files and history; and they resume together, or one by one."""
    config = tiny_config("lora", num_epochs=2, max_length=8)
    config.seeds, config.peft.lora.dropout = (1, 2, 3), 0.1
    alone = run(config, tmp_path / "alone")
    config.train.together = 3
    report, console = again(config, tmp_path / "together")
    assert any("seeds 1, 2, 3 train together" in line for line in console.lines)
    rows = {name: each["metrics"]["per_seed"] for name, each in (("alone", alone), ("together", report))}
    assert [row["last"] for row in rows["alone"]] == [row["last"] for row in rows["together"]]
    assert len({json.dumps(row["last"]) for row in rows["alone"]}) > 1

    def same(folder):
        for seed in config.seeds:
            for name in ("model/modules.safetensors", experiment.PREDICTIONS):
                one, two = (read_leaves(tmp_path / at / f"seed_{seed}" / name) for at in ("alone", folder))
                chex.assert_trees_all_close(one, two, atol=1e-5)

    same("together")
    # Seed 2 lost its last checkpoint, as if the run had been killed between the two; seed 3 has none yet.
    workdir = tmp_path / "together"
    for seed in config.seeds:
        (workdir / f"seed_{seed}" / "result.json").unlink()
    last = max((workdir / "seed_2/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(last)
    shutil.rmtree(workdir / "seed_3" / "checkpoints")
    _, console = again(config, workdir)
    assert [line.split()[3] for line in console.lines if line.startswith("resuming at step")] == ["6", "3"]
    same("together")
    # How many train together is no part of what a run is.
    config.train.together = None
    _, console = again(config, workdir)
    assert "  seed 2: finished earlier" in console.lines


def test_texts_of_unknown_words_are_refused(tiny_config, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"{'qq ' * (i % 4)}dog,{i % 2}\n" for i in range(40)))
    config = tiny_config("head", task="custom", num_epochs=1, max_length=8)
    config.data.path, config.data.train, config.data.text = None, str(path), ("text",)
    with pytest.raises(UserError, match="60 % of the words are unknown to the tokenizer"):
        run(config, tmp_path / "work")


def test_a_class_without_rows_is_warned_of(tiny_config, tmp_path, untrained):
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"the dog,{'ab'[i % 2]}\n" for i in range(40)))
    config = tiny_config("head", task="custom", num_epochs=1, max_length=8)
    config.data.path, config.data.train, config.data.text, config.data.labels = (
        None,
        str(path),
        ("text",),
        ("a", "b", "c"),
    )
    report, console = again(config, tmp_path / "work")
    assert "no training row has the label 'c'" in console.warnings
    assert "no training row has the label 'c'" in report["warnings"]


def test_rows_are_padded_to_as_many_lengths_as_the_config_says(tiny_config, monkeypatch):
    monkeypatch.setattr(loading, "COMPILE_TOKENS", 0)
    several, one = (loading.load(tiny_config("lora", padded_lengths=n), Heard())[0] for n in (3, 1))
    assert 1 < max(map(len, several.layouts)) <= 3
    assert max(map(len, one.layouts)) == 1
    assert several.batch_size == one.batch_size == 16
    assert several.longest == one.longest


def test_on_an_accelerator_batches_stay_whole(tiny_config, monkeypatch):
    monkeypatch.setattr(loading, "COMPILE_TOKENS", 0)
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(experiment.jax, "default_backend", lambda backend=backend: backend)
        data, *_ = loading.load(tiny_config("lora"), Heard())
        found[backend] = max(map(len, data.layouts))
    assert found["gpu"] == 1 < found["cpu"]


def test_rows_of_similar_length_meet_where_they_shall(tiny_config):
    data = loading.load(tiny_config("lora", group_by_length=True), Heard())[0]
    assert data.grouped
    assert all(len(layout) == 1 for layout in data.layouts)
    assert data.batch_size == 16
    assert not loading.load(tiny_config("lora"), Heard())[0].grouped


def test_padded_lengths_do_not_depend_on_the_other_seeds(tiny_config, monkeypatch):
    """Or a seed that is added would change the numbers of those that are there."""
    counts = set()
    for tokens in 10.0 ** np.arange(-3, 3):
        monkeypatch.setattr(loading, "COMPILE_TOKENS", tokens)
        found = []
        for seeds in ((11,), tuple(range(50))):
            config = tiny_config("lora")
            config.seeds = seeds
            data, *_ = loading.load(config, Heard())
            found.append((data.layouts, data.eval_buckets))
        assert found[0] == found[1]
        counts.add(len(found[0][0]))
    assert len(counts) > 1


def test_sets_of_one_label_each_are_warned_of(tiny_config, tmp_path, untrained):
    """Names between other signs than semicolons are one name."""
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"the dog,{('a|b', 'a')[i % 2]}\n" for i in range(40)))
    config = tiny_config("head", task="custom", num_epochs=1, max_length=8)
    config.data.update(path=None, train=str(path), text=("text",), kind="multilabel")
    _, console = again(config, tmp_path / "work")
    assert "no training row has more than one label; in text, names stand between ';'" in console.warnings


def test_a_task_that_encodes_by_itself_is_known_as_such(tiny_config, tiny_glue, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "import dataclasses\nfrom jpeft import Task\nfrom jpeft.data.tasks import task\n"
        "class Own(type(task('mrpc'))):\n"
        "    def encode(self, split, tokenizer, max_length):\n"
        "        return super().encode(split, tokenizer, max_length)\n"
        "def get_task():\n"
        "    given = task('mrpc')\n"
        "    return Own(**{x.name: getattr(given, x.name) for x in dataclasses.fields(given)})\n"
    )
    config = tiny_config("head", num_epochs=1, max_length=8)
    config.task = str(tmp_path / "own.py")
    run(config, tmp_path / "work")
    assert jpeft.load(tmp_path / "work" / "seed_11" / "model").own_encode


@pytest.mark.parametrize(("names", "warned"), [(("positive", "postive"), True), (("class_1", "class_2"), False)])
def test_a_label_that_may_be_misspelt_is_warned_of(tiny_config, tmp_path, untrained, names, warned):
    path, (often, once) = tmp_path / "train.csv", names
    rows = "".join(f"the dog,{once if i == 7 else ('negative', often)[i % 2]}\n" for i in range(60))
    path.write_text("text,label\n" + rows)
    config = tiny_config("head", task="custom", num_epochs=1, max_length=8)
    config.data.update(path=None, train=str(path), validation=str(path), text=("text",))
    _, console = again(config, tmp_path / "work")
    assert any("is it the same, misspelt?" in line for line in console.warnings) == warned
    assert any(f"'{once}' 1" in line for line in console.lines)
