"""A grid of runs: which cells there are, what is kept of them, and what is refused before any work."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from jpeft import UserError
from jpeft.core import files
from jpeft.data.tasks import TASKS
from jpeft.report import grid as grids
from jpeft.report.published import COLUMNS
from jpeft.run.console import Console
from jpeft.workbench import cells, compare, findings
from jpeft.workbench.cells import Cell

pytestmark = pytest.mark.usefixtures("programs_stay")
QUIET = Console(quiet=True)


@pytest.fixture
def grid(tiny_config):
    """Two variants with two seeds, runs of seconds."""

    def make(tasks=("mrpc",), seeds=(1, 2), **variants):
        grid = compare.default(variants or {"head": {"method": "head"}}, tasks, seeds)
        tiny = tiny_config("head")
        grid.run.model, grid.run.data.path = tiny.model, tiny.data.path
        grid.run.train.update(num_epochs=1, max_length=8)
        return grid

    return make


def test_cells_in_the_order_in_which_a_stopped_grid_is_of_most_use():
    grid = compare.default(("lora", "head"), ("mrpc", "cola"), (1, 2), (1e-3, 5e-4))
    names = [cell.name for cell in compare.cells(grid)]
    assert names[:5] == [
        "mrpc-head-0.001-1", "mrpc-lora-0.001-1", "mrpc-head-0.0005-1", "mrpc-lora-0.0005-1", "mrpc-head-0.001-2",
    ]  # fmt: skip
    assert len(names) == len(set(names)) == 16


def test_the_config_of_a_cell_has_the_fields_of_all_its_sources(grid):
    config = grid(small={"method": "lora", "peft": {"lora": {"rank": 2}}})
    config.by_task = {"mrpc": {"train": {"batch_size": 4}}}
    found = compare.config_of(config, Cell("mrpc", "small", 3e-3, 7))
    assert (found.method, found.task, found.seeds, found.peft.lora.rank) == ("lora", "mrpc", (7,), 2)
    assert (found.train.batch_size, found.train.num_epochs, found.train.learning_rate) == (4, 1, 3e-3)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"a": {"method": "lroa"}}, r"cell mrpc-a-1: config.method 'lroa' is unknown: did you mean 'lora'"),
        ({"a": {"method": "lora", "peft": {"lora": {"rnak": 2}}}},
         r"config.variants\['a'\]: 'peft.lora.rnak' is not a field of a run: did you mean 'peft.lora.rank'"),
        ({"a b": {"method": "head"}, "a_b": {"method": "head"}}, "two cells are called 'mrpc-a_b-1'"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_any_work(grid, variants, message):
    with pytest.raises(UserError, match=message):
        compare.check(grid(**variants))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rates": ("a",)}, "config.learning_rates must be positive numbers, got 'a'"),
        ({"learning_rates": (0.0,)}, "config.learning_rates must be positive numbers, got 0.0"),
        ({"run": None}, "config.run must be a dict, got None"),
        ({"by_task": {"cola": {"nonsense": 1}}}, "config.by_task has 'cola', which is none of the tasks"),
        ({"variants": {"a": {"method": 5}}}, r"config.variants\['a'\]: method cannot be 5"),
        ({"variants": {"a": 5}}, r"config.variants\['a'\] must be a dict"),
        ({"variants": {"a": {"method": "head", "seeds": (3,)}}}, "sets seeds, which is for the whole grid to say"),
        ({"variants": {"a": {"method": "head", "task": "cola"}}}, "sets task, which is for the whole grid to say"),
        ({"variants": {"a": {"train": {"num_epochs": 1}}}}, r"config.variants\['a'\] has no method"),
        ({"by_task": {"mrpc": {"method": "lora"}}}, r"config.by_task\['mrpc'\] sets method, which is for the grid"),
        (
            {"variants": {"a": {"method": "head", "train": {"learning_rate": 0.1}}}, "learning_rates": (0.2,)},
            r"config.variants\['a'\] sets a learning rate, and so does config.learning_rates",
        ),
        (
            {"curves": {"a": {"haed": 1}}},
            r"config.curves\['a'\] names 'haed', which is no variant: did you mean 'head'",
        ),
        ({"curves": {"a": {"head": "x"}}}, r"config.curves\['a'\] must be {variant: number}"),
        ({"curves": {"a": {"head": 1}}, "learning_rates": (0.1,)}, "give each its rate"),
        ({"reference": "haed"}, "config.reference names 'haed', which is no variant: did you mean 'head'"),
        ({"variants": {"\ud800": {"method": "head"}}}, "cannot be the name of a variant"),
        (
            {"run": {"train": {"export": "best"}}},
            "cell mrpc-head-1: train.export is 'best', but what is compared is the",
        ),
        (
            {"variants": {"a": {"method": "head"}, "b": {"method": "head", "data": {"path": "x"}}}},
            "cell mrpc-b-1: data.path is 'x', in another .*, but what is compared is scored on the same rows",
        ),
    ],
)
def test_grids_that_cannot_be(grid, changes, says):
    config = grid()
    with config.ignore_type(), config.unlocked():
        for name, value in changes.items():
            config[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=says):
        compare.check(config)


def test_nothing_to_compare(grid):
    with pytest.raises(UserError, match=r"config\.seeds is empty"):
        compare.check(grid(seeds=()))


def test_a_cell_is_one_small_file_and_is_not_run_again(grid, tmp_path, monkeypatch):
    config = grid(tasks=("mrpc", "stsb"), seeds=(1,))
    compare.check(config)
    folder, runs = tmp_path / "cells", tmp_path / "runs"
    assert [cell.task for cell in compare.run_all(config, folder, runs, QUIET)] == ["mrpc", "stsb"]
    classes, values = (json.loads((folder / f"{task}-head-1.json").read_text()) for task in ("mrpc", "stsb"))
    assert len(classes["predictions"]) == len(classes["labels"]) == 18
    assert set(classes["labels"]) == {"0", "1"}
    assert len(values["predictions"]) == 18
    assert "path" not in json.dumps(classes["config"])  # where the data lie is the machine's
    right = np.mean([a == b for a, b in zip(classes["predictions"], classes["labels"], strict=True)])
    assert classes["metrics"]["accuracy"] == pytest.approx(right)

    outcomes = findings.outcomes(config, folder)
    assert [o.score() for o in outcomes] == [
        pytest.approx(classes["metrics"]["accuracy"]), pytest.approx(values["metrics"]["pearson"], abs=1e-4),
    ]  # fmt: skip
    monkeypatch.setattr(compare.experiment, "run", lambda *_: pytest.fail("it ran a finished cell"))
    assert list(compare.run_all(config, folder, tmp_path / "elsewhere", QUIET)) == []


def test_a_score_of_the_users_own_sees_what_the_model_said(grid, tmp_path, monkeypatch):
    """A score that reads more than decisions is that of the run, in the comparison too."""

    def score(self, logits, labels):
        gap = logits[:, 1] - logits[:, 0]
        return {"f1": 0.0, "accuracy": float((gap[labels == 1][:, None] > gap[labels == 0]).mean())}  # the area

    own = type("Own", (type(TASKS["mrpc"]),), {"score": score})
    monkeypatch.setattr(
        compare.configs,
        "task_of",
        lambda config: own(
            **vars(TASKS["mrpc"]),
        ),
    )
    config = grid(seeds=(1,))
    list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET))
    row = files.read_record(tmp_path / "mrpc-head-1.json", cells.KIND)
    (found,) = findings.outcomes(config, tmp_path)
    assert found.score() == pytest.approx(row["metrics"]["accuracy"], abs=1e-4)
    decided = found._replace(logits=None).score()
    assert abs(decided - found.score()) > 0.01
    # A cell of an earlier version kept the decisions alone.
    del row["logits"]
    files.write_record(tmp_path / "mrpc-head-1.json", cells.KIND, row)
    with pytest.raises(UserError, match=r"its answers have a accuracy of .*, its run had .*: remove the file"):
        findings.outcomes(config, tmp_path)


def test_cells_of_other_rows_are_not_compared(grid, tmp_path):
    config = grid(one={"method": "head"}, two={"method": "head"}, seeds=(1,))
    list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET))
    path = tmp_path / "mrpc-two-1.json"
    row = files.read_record(path, cells.KIND)
    swapped = {name: row[name][::-1] for name in ("predictions", "labels")}
    assert swapped["labels"] != row["labels"]
    files.write_record(path, cells.KIND, row | swapped)
    with pytest.raises(
        UserError, match=r"two-1\.json: two and one were not evaluated on the same rows of mrpc, so their"
    ):
        findings.outcomes(config, tmp_path)


def test_a_quantised_base_is_held_against_its_own(grid, tmp_path):
    config = grid(plain={"method": "head"}, coded={"method": "head", "quantise": "int8"}, seeds=(1,))
    assert len(list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET))) == 2
    assert list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET)) == []


def test_files_of_other_cells_are_refused(grid, tmp_path):
    config = grid(seeds=(1,))
    list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET))
    config.run.train.num_epochs = 2
    with pytest.raises(UserError, match=r"of another config \(train.num_epochs was 1, now 2\)"):
        list(compare.run_all(config, tmp_path, tmp_path / "runs", QUIET))
    config.run.train.num_epochs = 1
    path = tmp_path / "mrpc-head-1.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"predictions": row["labels"]}))
    with pytest.raises(UserError, match="was changed or damaged after it was written"):
        findings.outcomes(config, tmp_path)
    path.write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        findings.outcomes(config, tmp_path)


def test_a_plan_in_a_file_is_what_the_file_says(grid, tmp_path):
    cell, path = Cell("mrpc", "mine", None, 1), tmp_path / "plan.json"

    def own(layer):
        path.write_text(f'{{"{layer}": [{{"method": "lora"}}]}}')
        given = {"method": "fishpal", "fishpal": {"plan": str(path)}}
        return compare.config_of(grid(mine=given), cell)

    first = own(0)
    assert cells._config(first)["fishpal.plan"] != cells._config(own(1))["fishpal.plan"]
    assert "plan.json" not in str(cells._config(first))


def test_cells_of_other_data_are_named(grid, tmp_path, tiny_glue):
    """As they would be if they were runs; where there are no data any more, a warning says so."""
    config = grid(seeds=(1,))
    own = tmp_path / "glue"
    shutil.copytree(tiny_glue, own)
    config.run.data.path = str(own)
    list(compare.run_all(config, tmp_path / "cells", tmp_path / "runs", QUIET))
    assert str(tmp_path) not in (tmp_path / "cells/mrpc-head-1.json").read_text()
    assert list(compare.run_all(config, tmp_path / "cells", tmp_path / "runs", QUIET)) == []
    lines = (own / "mrpc/validation.jsonl").read_text().splitlines()
    (own / "mrpc/test.jsonl").write_text("\n".join(lines) + "\n")  # of which a cell has no scores
    assert list(compare.run_all(config, tmp_path / "cells", tmp_path / "runs", QUIET)) == []
    (own / "mrpc/validation.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match=r"the evaluation data: 18 rows, now 17.*choose another --cells$"):
        list(compare.run_all(config, tmp_path / "cells", tmp_path / "runs", QUIET))
    shutil.rmtree(own)
    console = Console(quiet=True)
    assert list(compare.run_all(config, tmp_path / "cells", tmp_path / "runs", console)) == []
    assert "were not held against their data" in console.warnings[0]


def test_an_option_can_be_set_to_none(grid):
    """As a prefix without an MLP is; left out, the variant would train another module under its name."""
    config = grid(flat={"method": "prefix", "peft": {"prefix": {"mlp_hidden": None}}})
    found = compare.config_of(config, Cell("mrpc", "flat", None, 1))
    assert found.peft.prefix.mlp_hidden is None
    assert cells._config(found)["peft.prefix.mlp_hidden"] is None


def test_a_field_of_none_is_not_a_field_that_is_absent(grid, tmp_path):
    plain, flat = (grid(seeds=(1,), x={"method": "prefix", "peft": {"prefix": o}}) for o in ({}, {"mlp_hidden": None}))
    row = {"config": cells._config(compare.config_of(plain, Cell("mrpc", "x", None, 1)))}
    files.write_record(tmp_path / "mrpc-x-1.json", cells.KIND, row)
    cell = Cell("mrpc", "x", None, 1)
    with pytest.raises(UserError, match=r"peft.prefix.mlp_hidden was not set, now None"):
        cells.read(tmp_path, compare.config_of(flat, cell), cell)


def test_class_ids_are_digits_while_there_are_ten():
    assert cells._packed(np.array([0, 9, 2])) == "092"
    np.testing.assert_array_equal(cells.unpacked("092"), [0, 9, 2])
    many = cells.unpacked(cells._packed(np.array([0, 10, 2])))
    np.testing.assert_array_equal(many, [0, 10, 2])
    assert np.issubdtype(many.dtype, np.integer)


def test_a_variant_that_is_named_twice_is_one_line():
    with pytest.raises(UserError, match="the variant 'head' is named twice"):
        compare.default(("head", "lora", "head"), ("mrpc",))


def test_a_variant_with_a_dot_is_one_line():
    with pytest.raises(UserError, match=r"the variant 'lora_0\.1' has a dot in its name"):
        compare.default({"lora_0.1": {"method": "lora"}}, ("mrpc",))


def test_what_is_not_alike_on_any_task_is_said(grid):
    config = grid(tasks=("mrpc", "cola"), a={"method": "head", "train": {"num_epochs": 3}}, b={"method": "head"})
    config.by_task = {"mrpc": {"train": {"num_epochs": 5}}, "cola": {"train": {"num_epochs": 3}}}
    assert findings.unlike(config) == ["train.num_epochs is 3 for a, 5 for b"]


def test_what_is_not_alike_is_said(grid):
    assert findings.unlike(grid()) == []
    config = grid(short={"method": "head"}, long={"method": "head", "train": {"num_epochs": 3}})
    (told,) = findings.unlike(config)
    assert told == "train.num_epochs is 3 for long, 1 for short"
    assert f"**Not alike: {told}.**" in grids.markdown(grids.Grid({}, 1, 1, {}, [told]), None)


def test_published_scores_stand_beside_variants_and_their_rates(grid, tmp_path):
    path = tmp_path / "scores.csv"
    rows = ("head,a-model,test,mrpc,f1,81.2,,someone", "head,a-model,test,cola,matthews,30,,someone")
    path.write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    config = grid()
    config.learning_rates = (1e-3, 2e-3)
    assert findings.published(config) == {}
    config.published = str(path)
    compare.check(config)
    found = findings.published(config)
    assert {task: {name: row.score for name, row in rows.items()} for task, rows in found.items()} == {
        "mrpc": {"head @ 0.001": "81.2", "head @ 0.002": "81.2"}
    }
    several = grid(
        head={"method": "head"}, longer={"method": "head", "train": {"num_epochs": 2}}, other={"method": "head"}
    )
    several.published = str(path)
    assert list(findings.published(several)["mrpc"]) == ["head"]  # nobody knows which of the others it is
    with config.ignore_type():
        config.published = 5
        with pytest.raises(UserError, match=r"config\.published must be the name of a CSV file, got 5"):
            compare.check(config)
        config.published = str(path)
    path.write_text("method,score\n")
    with pytest.raises(UserError, match=r"the columns of .* are 'method, score', not method, model"):
        compare.check(config)


def test_published_scores_of_a_task_of_ones_own(grid, tmp_path):
    """They go by its name, whatever its file is called."""
    (tmp_path / "a_file.py").write_text(
        "from jpeft import Task\ndef get_task():\n    return Task('headlines', ('text',), ('a', 'b'))\n"
    )
    path = tmp_path / "scores.csv"
    path.write_text("\n".join([",".join(COLUMNS), "head,a-model,test,headlines,accuracy,81.2,,someone", ""]))
    config = grid(tasks=(str(tmp_path / "a_file.py"),))
    config.published = str(path)
    assert findings.published(config)["headlines"]["head"].score == "81.2"


def test_the_warnings_of_a_cell_are_its_own(grid, tmp_path):
    """One console serves them all."""
    config = grid(
        seeds=(1,), cached={"method": "lora", "train": {"cache_frozen_layers": True}}, plain={"method": "lora"}
    )
    console = Console(quiet=True)
    for _ in compare.run_all(config, tmp_path / "cells", tmp_path / "runs", console):
        pass
    told = {path.parent.name: json.loads(path.read_text())["warnings"] for path in tmp_path.glob("runs/**/report.json")}
    with_it = [name for name, lines in told.items() if any("cache_frozen_layers" in line for line in lines)]
    assert len(told) == 2
    assert with_it == [name for name in told if "cached" in name]
