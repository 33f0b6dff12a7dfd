"""The comparison of all methods: its table, its picture, its errors."""

import pytest

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.report import plots
from jpeft.workbench import methods
from jpeft.workbench.cells import KIND

ROW = {
    "trainable_percent": 0.269, "added_percent": 0.0, "merges": True, "train_time_ratio": 0.571,
    "infer_time_ratio": 1.0, "train_memory_bytes": 420_000_000,
}  # fmt: skip
SCORED = {
    **ROW, "merges": False, "module_bytes": 301_440, "primary_metric": "accuracy", "learning_rate": 0.002,
    "scores": {"11": 0.78, "22": 0.8},
}  # fmt: skip


def test_the_table_has_a_row_a_method_and_dashes_for_what_is_not_measured():
    lines = methods.table({"lora": ROW, "pfeiffer": SCORED}).splitlines()
    assert lines[0].endswith("| memory MB | file kB | learning rate | accuracy |")
    assert lines[2] == "| lora | 0.269 | 0.000 | yes | 0.57 | 1.00 | 420 | - | - | - |"
    assert lines[3].endswith("| no | 0.57 | 1.00 | 420 | 301 | 0.002 | 79.0 ± 1.4 |")


def test_scores_come_from_the_cells_of_a_grid(tmp_path):
    def cell(variant, seed, score, task="sst2", **more):
        row = {
            "task": task, "variant": variant, "seed": seed, "config": {"method": variant, "seeds": [seed]},
            "primary_metric": "accuracy",
            "metrics": {"accuracy": score}, "module_bytes": 7, **more,
        }  # fmt: skip
        files.write_record(tmp_path / f"{task}-{variant}-{seed}.json", KIND, row)

    with pytest.raises(UserError, match="must have cells of methods on one task, has none"):
        methods.scores(tmp_path)
    cell("lora", 11, 0.5)
    cell("lora", 22, 0.7)
    cell("fishpal", 11, 0.9, choice={"rates": {"11": 4.0}})
    cell("lora_x4", 11, 0.1)  # not a method's name
    found = methods.scores(tmp_path)
    assert found["lora"] == {
        "primary_metric": "accuracy", "learning_rate": 5e-4, "module_bytes": 7, "scores": {"11": 0.5, "22": 0.7},
    }  # fmt: skip
    assert found["fishpal"]["learning_rate"] is None
    assert set(found) == {"lora", "fishpal"}
    assert "| - | chosen | 90.0 |" in methods.table({"fishpal": ROW | found["fishpal"] | {"module_bytes": None}})
    assert "| chosen | 90.0 |" in methods.table({"fishpal": ROW | found["fishpal"]})
    cell("lora", 33, 0.7, config={"method": "lora", "seeds": [33], "train.learning_rate": 0.002})
    with pytest.raises(UserError, match="has cells of lora by several recipes"):
        methods.scores(tmp_path)
    for other in ({"method": "lora", "peft.lora.rank": 64}, {"method": "full"}):
        cell("lora", 33, 0.7, config=other)
        with pytest.raises(UserError, match="lora there is not the method of that name with its default options"):
            methods.scores(tmp_path)
    other = {"method": "houlsby", "model": "roberta-large"}
    cell("houlsby", 11, 0.7, config=other)
    cell("lora", 33, 0.7)
    with pytest.raises(UserError, match="has cells of more than one model: give it those of one grid"):
        methods.scores(tmp_path)
    for path in tmp_path.glob("*-houlsby-*"):
        path.unlink()
    for seed, rows in ((44, "a"), (55, "b")):
        cell("lora", seed, 0.7, inputs={"dev": [8, rows]})
    with pytest.raises(UserError, match="has cells of more than one set of evaluation rows"):
        methods.scores(tmp_path)
    for path in tmp_path.glob("*-*-[45]?.json"):
        path.unlink()
    cell("lora", 11, 0.5, task="mrpc")
    with pytest.raises(UserError, match="has mrpc, sst2"):
        methods.scores(tmp_path)


def test_the_picture_is_written(tmp_path):
    plots.methods(tmp_path / "methods.png", {"head": {**SCORED, "trainable_percent": 0.0}, "lora": SCORED, "dora": ROW})
    assert (tmp_path / "methods.png").stat().st_size > 5000


def test_what_was_measured_of_another_model_is_not_taken(capsys, tmp_path):
    (tmp_path / "methods.json").write_text('{"of": {"model": "minilm"}, "rows": {}}')
    assert methods.main(["--model", "bert-base-uncased", "--workdir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "has what was measured of {'model': 'minilm'}, not of {'model': 'bert-base-uncased'," in told


def test_an_unknown_method_is_one_line(capsys, tmp_path):
    assert methods.main(["--methods", "lroa", "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: method 'lroa' is unknown: did you mean 'lora'")
    with pytest.raises(SystemExit):
        methods.main(["--help"])
    assert "compares" in capsys.readouterr().out.lower()
