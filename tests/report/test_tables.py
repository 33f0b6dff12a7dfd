import math
import re

import pytest

from jpeft.core import files
from jpeft.plans.plan import Entry
from jpeft.report import __main__, tables

SUMMARY = {0: "| a table |"}


def report(scores=((0.5, 0.6), (0.7, 0.8)), **changes):
    per_seed = [
        {"seed": seed, "last": {"accuracy": a, "f1": f}, "best": {"epoch": 1, "accuracy": a + 0.01, "f1": f}}
        for seed, (a, f) in enumerate(scores)
    ]
    return {
        "task": "mrpc",
        "method": "lora",
        "model": "minilm",
        "split": "validation",
        "primary_metric": "accuracy",
        "metrics": {**tables.spread([row["last"] for row in per_seed]), "per_seed": per_seed},
        "parameters": {
            "base": 1_000_000, "head": 770, "trainable": 5_770, "trainable_percent": 0.5766, "added_at_inference": 0,
            "added_percent": 0.0, "module_bytes": 23_080,
        },
        "seconds": {"load": 1.0, "fisher": 0.0, "compile": 3.25, "train": 10.0, "evaluate": 2.0},
        "examples_per_second": 123.45,
        "inference_examples_per_second": 678.9,
        "peak_memory_bytes": 1_500_000_000,
        "versions": {"jpeft": "0.1", "jax": "0.10"},
        "baseline": {"answer": "majority class", "metrics": {"accuracy": 0.55, "f1": 0.0}},
        "other_splits": {},
        "data": {"train": "a", "dev": "b"},
        "examples": {"train": 3668, "evaluation": 408},
        "recipe": {"num_epochs": 3, "batch_size": 16, "dtype": "float32"},
        "learning_rate": 5e-4,
        "device": "cpu",
        "warnings": [],
        "command": None,
        **changes,
    }  # fmt: skip


def test_spread_is_mean_and_sample_deviation():
    spread = tables.spread([{"f1": 0.5, "accuracy": 1.0}, {"f1": 0.7, "accuracy": 1.0}])
    assert spread["mean"] == pytest.approx({"f1": 0.6, "accuracy": 1.0})
    assert spread["std"] == pytest.approx({"f1": math.sqrt(0.02), "accuracy": 0.0})


def test_spread_of_one_seed_has_no_deviation():
    assert tables.spread([{"f1": 0.5}]) == {"mean": {"f1": 0.5}, "std": {"f1": None}}


def test_average_stays_whole_where_all_agree():
    averaged = tables.average([{"same": 7, "differs": 1}, {"same": 7, "differs": 2}])
    assert averaged == {"same": 7, "differs": 1.5}
    assert isinstance(averaged["same"], int)


def test_plan_lines_join_neighbours_only():
    prefix, lora = [Entry("prefix")], [Entry("lora", {"rank": 4, "alpha": 8.0})]
    plan = {3: prefix, 0: prefix, 1: prefix, 2: lora, 6: prefix, 5: prefix + lora, 8: prefix}
    assert tables.plan_lines(plan) == [
        "0-1 prefix",
        "2 lora(rank=4, alpha=8.0)",
        "3 prefix",
        "5 prefix + lora(rank=4, alpha=8.0)",
        "6 prefix",
        "8 prefix",
    ]


def test_markdown_shows_every_seed_and_the_spread():
    page = tables.markdown(report(), {}, SUMMARY, None)
    assert page.startswith("# lora on mrpc (minilm)\n")
    assert "| 0 | 50.00 (51.00) | 60.00 (60.00) |" in page
    assert "| 1 | 70.00 (71.00) | 80.00 (80.00) |" in page
    assert "| **mean ± std** | 60.00 ± 14.14 | 70.00 ± 14.14 |" in page
    assert "| trainable parameters (modules and head) | 5,770 |" in page
    assert "| trainable, of base and head | 0.58 % |" in page
    assert "| seconds: compile | 3.2 |" in page or "| seconds: compile | 3.3 |" in page
    assert "| training | 123.5 examples/s |" in page or "| training | 123.4 examples/s |" in page
    assert "Made by jpeft 0.1, jax 0.10." in page
    assert "| majority class | 55.00 | 0.00 |" in page
    for row in (
        "train examples | 3,668",
        "learning rate | 0.0005",
        "num epochs | 3",
        "batch size | 16",
        "device | cpu",
    ):
        assert f"| {row} |" in page
    assert "## Warnings" not in page
    assert "No better" not in page
    assert "Which module" not in page
    assert "![" not in page


def test_markdown_keeps_the_command_and_the_warnings():
    page = tables.markdown(report(command="python -m jpeft.main", warnings=["a", "b"]), {}, SUMMARY, None)
    assert "## Warnings\n\n- a\n- b\n" in page
    assert "jax 0.10:\n\n    python -m jpeft.main\n" in page


def test_a_run_that_does_no_better_than_the_majority_class_says_so():
    one = report(scores=[(0.55, 0.1)])
    assert tables.no_better(one).startswith("No better than always answering the majority class: accuracy 55.00")
    assert f"**{tables.no_better(one)}**" in tables.markdown(one, {}, SUMMARY, None)
    assert tables.no_better(report(scores=[(0.56, 0.0)])) == ""
    assert tables.no_better(report(scores=[(0.55 + 1e-16, 0.0)] * 3))


def test_markdown_tables_have_rows_of_one_width():
    page = tables.markdown(report(), {0: {0: [Entry("lora")]}}, SUMMARY, None)
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_markdown_of_one_seed_has_no_spread():
    assert "±" not in tables.markdown(report(scores=[(0.5, 0.6)]), {}, SUMMARY, None)


def test_markdown_shows_plans_and_the_picture():
    plans = {0: {0: [Entry("lora")], 1: [Entry("lora")]}, 1: {0: [Entry("prefix")]}}
    page = tables.markdown(report(), plans, SUMMARY, "fisher.png")
    assert "- seed 0: layers 0-1 lora\n- seed 1: layers 0 prefix" in page
    assert "](fisher.png)" in page
    assert "![" not in tables.markdown(report(), plans, SUMMARY, None)


def test_compare_aligns_rows_and_leaves_out_what_a_task_lacks():
    other = report(task="sst2", method="fishpal")
    other["metrics"] = {"mean": {"accuracy": 0.9}, "std": {"accuracy": None}, "per_seed": []}
    other["baseline"] = {"answer": "majority class", "metrics": {"accuracy": 0.5}}
    lines = tables.compare([report(), report(), other]).splitlines()
    assert lines.pop() == "Not alike, so compare with care: task (mrpc, sst2); seeds (2, 0)."
    assert lines.pop() == ""
    assert len({len(line) for line in lines}) == 1
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head == ["method", "task", "model", "accuracy", "f1", "trainable %", "added %", "train examples/s"]
    assert set("".join(rule)) == {"-"}
    assert rows[0][:5] == ["majority class", "mrpc", "", "55.00", "0.00"]
    assert rows[1][3:5] == rows[2][3:5] == ["60.00 ± 14.14", "70.00 ± 14.14"]
    assert rows[3][:5] == ["majority class", "sst2", "", "50.00", "-"]
    assert rows[4][:5] == ["fishpal", "sst2", "minilm", "90.00", "-"]


def test_runs_that_look_alike_are_told_apart_by_their_names():
    """As those on different files of one's own, which are all "custom"."""
    _, rows = tables.table([report(), report(), report(method="dora")], ["runs/a", "runs/b", "runs/c"])
    assert [row[0] for row in rows] == ["majority class", "lora, runs/a", "lora, runs/b", "dora"]
    _, rows = tables.table([report(), report()])
    assert [row[0] for row in rows] == ["majority class", "lora", "lora"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bert"}, "model (minilm, bert)"),
        ({"examples": {"train": 100, "evaluation": 408}}, "training examples (3,668, 100)"),
        ({"recipe": {"num_epochs": 10}}, "epochs (3, 10)"),
        ({"recipe": {"num_epochs": 3, "quantise": "nf4"}}, "quantise (no, nf4)"),
        ({"recipe": {"num_epochs": 3, "cache_frozen_layers": True}}, "cache_frozen_layers (no, True)"),
        ({"recipe": {"num_epochs": 3, "batch_size": 32}}, "batch_size (16, 32)"),
        ({"recipe": {"num_epochs": 3, "init_from": "runs/mnli"}}, "init_from (no, runs/mnli)"),
        ({"data": {"train": "a", "dev": "c"}}, "the data of mrpc"),
    ],
)
def test_what_makes_runs_hard_to_compare_is_told(changes, says):
    assert says in tables.compare([report(), report(**changes)])
    assert "Not alike" not in tables.compare([report(), report()])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metrics": None}, "its metrics is None"),
        ({"metrics": {"mean": {}, "std": {}}}, r"it has no metrics\.per_seed"),
        ({"metrics": {"mean": {"f1": "high"}, "std": {}, "per_seed": []}}, r"its metrics\.mean\.f1 is 'high'"),
        ({"metrics": {"mean": {}, "std": {}, "per_seed": [{"seed": 1}]}}, r"it has no metrics\.per_seed\.0\.last"),
        ({"examples": {"train": 3}}, r"it has no examples\.evaluation"),
        ({"data": [1]}, r"its data is \[1\]"),
        ({"task": None}, "its task is None"),
        ({"examples_per_second": "9"}, "its examples_per_second is '9'"),
    ],
)
def test_a_report_that_no_run_writes_is_one_line(tmp_path, capsys, changes, says):
    """Its hash is right: anyone can compute it."""
    files.write_record(tmp_path / "report.json", tables.REPORT, report(**changes))
    assert __main__.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert re.search(rf"report\.json is not a report of a run of this version of jpeft: {says}", told)
    assert told.count("\n") == 1


def test_a_report_that_a_run_writes_is_read(tmp_path, capsys):
    for changes in ({}, {"data": None}, {"command": "python"}):
        files.write_record(tmp_path / "report.json", tables.REPORT, report(**changes))
        assert __main__.main([str(tmp_path)]) == 0
        assert "| lora " in capsys.readouterr().out


def test_the_summary_is_told_once_if_all_seeds_agree():
    page = tables.markdown(report(), {}, {0: "| x |", 1: "| x |"}, None)
    assert page.count("| x |") == 1
    page = tables.markdown(report(), {}, {0: "| x |", 1: "| y |"}, None)
    assert "Seed 0:\n\n| x |" in page
    assert "Seed 1:\n\n| y |" in page
