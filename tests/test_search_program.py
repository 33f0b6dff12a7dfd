"""The program `python -m jpeft.search`."""

import json
import sys

import pytest
from report.test_front import brute
from workbench.spaces import SPACE

from jpeft import search as program
from jpeft.core import files
from jpeft.plans import plan as plans
from jpeft.report.front import Point
from jpeft.workbench import best, trials
from jpeft.workbench import space as spaces

# ml_collections loads the config file with it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("programs_stay"),
]


@pytest.fixture
def file(tiny_config, tmp_path):
    tiny = tiny_config("head")
    path = tmp_path / "tiny.py"
    path.write_text(
        f"""
from jpeft.workbench import search
def get_config():
    config = search.default("mrpc", {SPACE}, trials=3)
    config.run.update(model={tiny.model!r}, seeds=(2,))
    config.run.data.path = {tiny.data.path!r}
    config.run.train.update(num_epochs=2, max_length=8)
    return config
"""
    )
    return path


def test_a_search_ends_on_its_report_and_trains_nothing_twice(file, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    argv = ["search", f"--config={file}", f"--workdir={work}"]
    real, left = trials.experiment.run, iter(range(2))

    def run(config, workdir, *rest):
        report = real(config, workdir, *rest)
        if next(left, None) is None:  # trained, and killed before it could say so
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(trials.experiment, "run", run)
    assert program.main(argv) == 130
    assert "**2 of 3 trials are finished.**" in (work / best.REPORT).read_text()
    monkeypatch.setattr(trials.experiment, "run", real)
    assert program.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count(", taken up again (2 of 3 done)") == 1

    record = files.read_record(work / best.TRIALS, best.KIND)
    assert len({json.dumps(row["plan"]) for row in record["trials"]}) == len(record["trials"]) == 3
    on_front = {row["number"] for row in record["trials"] if row["front"]}
    assert on_front == brute([Point(r["number"], {}, r["score"], r["percent"], 0) for r in record["trials"]])
    assert {int(number) for number in record["full"]} == on_front
    assert all(row["seeds"] == 1 for row in record["full"].values())
    assert {path.stem for path in (work / best.FRONT).glob("*.json")} == set(map(str, on_front))
    for row in record["trials"]:
        _check_sizes(work, row)
        if row["front"]:
            assert plans.read(str(work / best.FRONT / f"{row['number']}.json")) == plans.loads(json.dumps(row["plan"]))
    assert (work / best.PICTURE).read_bytes()[:4] == b"\x89PNG"
    page = (work / best.REPORT).read_text()
    assert "finished" not in page
    assert "--config.fishpal.plan=front/" in page

    before = files.read_record(work / best.TRIALS, best.KIND)
    monkeypatch.setattr(trials.experiment, "run", lambda *_: pytest.fail("it ran what is finished"))
    assert program.main(argv) == 0
    assert files.read_record(work / best.TRIALS, best.KIND) == before

    assert program.main([*argv, "--config.run.train.batch_size=8"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert "is of another search (run.train.batch_size was 'not set', now 8; search.train.batch_size was" in err


def _check_sizes(work, row):
    """Percentages count what the plan trains, by hand, and neither the head nor anything else."""
    d, count = 16, 0
    for entries in row["plan"].values():
        for entry in entries:
            options = entry["options"]
            b = options.get("bottleneck", 0)
            count += 2 * d * options["num_virtual_tokens"] if entry["method"] == "prefix" else 2 * d * b + b + d
    (report,) = (
        report
        for path in (work / "trials").glob("*/report.json")
        if spaces.key(plans.loads(json.dumps(row["plan"]))) == path.parent.name and (report := files.read_json(path))
    )
    sizes = report["parameters"]
    assert row["percent"] == pytest.approx(100 * count / (sizes["base"] + sizes["head"]))
    assert row["score"] == report["metrics"]["mean"][report["primary_metric"]]


def test_without_optuna_there_is_one_line(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # importing it fails
    assert program.main(["search", f"--config={file}", f"--workdir={tmp_path / 'work'}"]) == 2
    assert capsys.readouterr().err == "error: a search needs Optuna: pip install 'jpeft[search]'\n"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config.space.serial.sizes=(2, 1)", "config.space.serial.sizes must be whole numbers in rising order"),
        ("--config.trails=3", "config.trails is not a field of the config: did you mean 'config.trials'"),
        ("--cells=x", "unknown flag --cells"),
        ("--config.task=mrcp", "did you mean 'mrpc'"),
    ],
)
def test_a_mistake_is_one_line(file, tmp_path, capsys, given, message):
    assert program.main(["search", f"--config={file}", f"--workdir={tmp_path / 'work'}", given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as exited:
        program.main(["search", "--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    assert "  # how many trials are drawn at random.\n  --config.startup=10\n" in out
    for part in ("python -m jpeft.search --config", "--workdir", "num_virtual_tokens", "warm_start=True"):
        assert part in out
