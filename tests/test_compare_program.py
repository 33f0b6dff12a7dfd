"""The program: python -m jpeft.compare."""

import pytest

from jpeft import compare as program

# ml_collections loads the config file with it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("programs_stay"),
]


@pytest.fixture
def config(tmp_path, tiny_config):
    tiny = tiny_config("head")
    path = tmp_path / "grid.py"
    path.write_text(
        f"""
from jpeft.workbench import compare
def get_config():
    curves = {{"both": {{"head": None, "bitfit": None}}}}
    grid = compare.default(("head", "bitfit"), ("mrpc",), (1,), curves=curves, reference="head")
    grid.run.model, grid.run.data.path = {tiny.model!r}, {tiny.data.path!r}
    grid.run.train.update(num_epochs=1, max_length=8)
    return grid
"""
    )
    return path


def test_a_comparison_ends_on_its_report_and_resumes(config, tmp_path, capsys, monkeypatch):
    argv = ["compare", f"--config={config}", f"--workdir={tmp_path / 'work'}"]
    from jpeft.workbench import compare

    real, left = compare.experiment.run, iter(range(1))

    def run(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(compare.experiment, "run", run)
    assert program.main(argv) == 130
    assert "1 of 2 cells are finished" in (tmp_path / "work" / "report.md").read_text()
    monkeypatch.setattr(compare.experiment, "run", real)
    assert program.main(argv) == 0
    page = (tmp_path / "work" / "report.md").read_text()
    assert "finished" not in page
    assert "| bitfit " in page
    assert "](report.png)" in page
    assert "## Along trained parameters" in page
    assert (tmp_path / "work" / "curves.png").stat().st_size > 5000
    assert (tmp_path / "work" / "report.png").is_file()
    assert "report.md" in capsys.readouterr().out
    assert "Bands: three standard deviations" in (tmp_path / "work" / "report.html").read_text()
    lines = (tmp_path / "work" / "report.csv").read_text().splitlines()
    assert lines[0] == "variant,trainable %,added %,mrpc accuracy"
    assert {line.split(",")[0] for line in lines[1:]} == {"head", "bitfit", "an answer that reads no text"}
    assert "toprule" in (tmp_path / "work" / "report.tex").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config.variants.head.method=haed", "did you mean 'head'?"),
        ("--config.run.train.num_epohcs=2", "config.run.train.num_epohcs is not a field of the config"),
        ("--cell=x", "unknown flag --cell: did you mean 'cells'?"),
        ("--config.tasks=('mrcp',)", "did you mean 'mrpc'"),
    ],
)
def test_a_mistake_is_one_line(config, tmp_path, capsys, given, message):
    assert program.main(["compare", f"--config={config}", f"--workdir={tmp_path / 'work'}", given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as exited:
        program.main(["compare", "--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    for part in (
        "python -m jpeft.compare --config",
        "--cells",
        "--config.learning_rates='()'",
        "  # the variant that the others, and the curves, are held against.\n  --config.reference=",
    ):
        assert part in out
