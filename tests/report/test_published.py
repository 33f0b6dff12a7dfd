"""Published scores: files of them, and what stands beside which variant."""

from pathlib import Path

import pytest

from jpeft.core.errors import UserError
from jpeft.data.tasks import TASKS
from jpeft.report import published
from jpeft.report.published import COLUMNS
from jpeft.transforms.registry import METHODS

FOLDER = Path(__file__).parents[2] / "third_party" / "results"
HEAD = ",".join(COLUMNS)
LORA = "lora,roberta-base,validation,sst2,accuracy,95.1,0.3,a table"


def written(tmp_path, *lines):
    path = tmp_path / "scores.csv"
    path.write_text("\n".join([*lines, ""]))
    return path


def test_a_variant_is_found_by_its_own_name_first(tmp_path):
    rows = published.read(written(tmp_path, HEAD, LORA, LORA.replace("lora", "lora 4", 1).replace("95.1", "94.0")))
    variants = {name: (name, "lora") for name in ("lora 4", "lora 8")} | {"head": ("head", "head")}
    found = published.beside(rows, variants, {})
    assert {name: row.score for name, row in found["sst2"].items()} == {"lora 4": "94.0", "lora 8": "95.1"}
    assert published.sources(rows) == ["a table (roberta-base, validation split)"]


def test_the_primary_metric_goes_before_others(tmp_path):
    f1 = LORA.replace("accuracy", "f1").replace("95.1", "90.0")
    rows = published.read(written(tmp_path, HEAD, f1, LORA))
    for metrics, score in (({"sst2": "accuracy"}, "95.1"), ({"sst2": "matthews"}, "90.0")):
        assert published.beside(rows, {"a": ("lora",)}, metrics)["sst2"]["a"].score == score


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "the columns of .* are '', not method, model"),
        ((HEAD.replace("score", "mark"), LORA), "the columns of .* mark"),
        ((HEAD, LORA + ",more"), "line 2 of .* has 9 columns, not 8"),
        ((HEAD, LORA, LORA.replace("95.1", "good")), "line 3 of .* has the score 'good', not a number"),
        ((HEAD, '"lora'), "cannot be read"),
        ((HEAD, LORA, LORA.replace("95.1", "96.0")), "has the accuracy of lora on sst2 more than once"),
    ],
)
def test_another_file_is_one_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as raised:
        published.read(written(tmp_path, *lines))
    assert "\n" not in str(raised.value)


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv cannot be read"):
        published.read(tmp_path / "none.csv")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_the_tables_here_are_whole(path):
    rows = published.read(path)
    assert len({(row.method, row.task) for row in rows}) == len(rows)
    for row in rows:
        assert row.source
        assert 0 < float(row.score) < 100
        assert row.task in {*TASKS, "glue", "mnli_mismatched", "ax"}
        # Ours, or a variant of one: a size after it, or which of its modules.
        assert any(row.method.lower().replace("top layers", "top_k_layers").startswith(name) for name in METHODS)
