"""The comparison of all methods: its table, its picture, its errors."""

import pytest

from jpeft.report import plots
from jpeft.workbench import methods

ROW = {
    "trainable_percent": 0.269, "added_percent": 0.0, "merges": True, "train_time_ratio": 0.571,
    "infer_time_ratio": 1.0, "train_memory_bytes": 420_000_000,
}  # fmt: skip
SCORED = {**ROW, "merges": False, "module_bytes": 301_440, "primary_metric": "accuracy", "metrics": {"accuracy": 0.79}}


def test_the_table_has_a_row_a_method_and_dashes_for_what_is_not_measured():
    lines = methods.table({"lora": ROW, "pfeiffer": SCORED}).splitlines()
    assert lines[0].endswith("| memory MB | file kB | accuracy |")
    assert lines[2] == "| lora | 0.269 | 0.000 | yes | 0.57 | 1.00 | 420 | - | - |"
    assert lines[3].endswith("| no | 0.57 | 1.00 | 420 | 301 | 79.0 |")


def test_the_picture_is_written(tmp_path):
    plots.methods(tmp_path / "methods.png", {"head": {**SCORED, "trainable_percent": 0.0}, "lora": SCORED, "dora": ROW})
    assert (tmp_path / "methods.png").stat().st_size > 5000


def test_an_unknown_method_is_one_line(capsys, tmp_path):
    assert methods.main(["--methods", "lroa", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: method 'lroa' is unknown: did you mean 'lora'")
    with pytest.raises(SystemExit):
        methods.main(["--help"])
    assert "compares" in capsys.readouterr().out.lower()
