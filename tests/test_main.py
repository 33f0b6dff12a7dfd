import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jpeft
from jpeft import main as program
from jpeft.core import files
from jpeft.run import command

# ml_collections loads the config file with it.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, tiny_config, tiny_model, tiny_glue):
    """A config file of a LoRA run of one epoch."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from jpeft.run import config as c\n"
        "def get_config(variant=''):\n"
        "    config = c.default('mrpc', 'lora')\n"
        f"    config.model, config.data.path = {str(tiny_model)!r}, {str(tiny_glue)!r}\n"
        "    config.train.update(num_epochs=1, max_length=16)\n"
        "    return c.variant(config, variant)\n"
    )
    return path


@pytest.fixture
def failing(tmp_path, capsys, config, monkeypatch):
    """Runs the program, which must fail, and returns its one line."""
    monkeypatch.setattr(sys, "argv", ["pytest", "--config.train.num_epochs=77"])  # must not be read

    def call(*args):
        capsys.readouterr()
        assert program.main(["jpeft", *map(str, args), f"--workdir={tmp_path / 'work'}"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0]
        return lines[0]

    return call


OVERRIDES = {
    "--config.train.num_epoch=3": ["config.train.num_epoch is not a field", "'config.train.num_epochs'"],
    "--config.trian.num_epochs=3": ["config.trian.num_epochs is not a field", "'config.train.num_epochs'"],
    "--config.peft.lora.rnak=3": ["'config.peft.lora.rank'"],
    "--config.train.num_epochs.x=3": ["config.train.num_epochs.x is not a field"],
    "--config.train=3": ["config.train is not a field"],
    "--config.train.num_epochs=three": ["config.train.num_epochs", "'three'"],
    "--config.train.learning_rate=fast": ["config.train.learning_rate", "'fast'"],
    "--wrkdir=x": ["unknown flag --wrkdir: did you mean 'workdir'?"],
    "stray": ["unexpected argument 'stray'"],
    "--config.task=mprc": ["config.task 'mprc' is unknown: did you mean 'mrpc'"],
    "--config.method=lroa": ["config.method 'lroa' is unknown: did you mean 'lora'"],
    "--config.peft.lora.dropout=1.5": ["config.peft.lora: dropout", "got 1.5"],
    "--config.train.warmup_ratio=1": ["config.train.warmup_ratio", "below 1"],
    "--config.train.max_length=33": ["config.train.max_length 33", "at most 32"],
    "--config.model=./nowhere": ["'./nowhere' does not exist"],
    "--config.train.num_epochs=1.5": ["config.train.num_epochs must be a whole number, got '1.5'"],
    "--config.train.learning_rate=high": ["config.train.learning_rate must be a number, got 'high'"],
    "--config.data.path=./nowhere": ["no folder nowhere"],
    "--config.task=rte": ["rte", "no folder"],
    "--config.task=ax": ["config.task 'ax' is a test set"],
    "--config.fishpal.plan=thesis_mrpc": ["config.fishpal.plan is set, but config.method is 'lora'"],
    "--config.peft.pfeiffer.bottleneck=4": ["config.peft.pfeiffer.bottleneck is set, but config.method is 'lora'"],
    "--config.data.train=x.csv": ["config.data.train is set, but config.task 'mrpc' does not read it"],
    "--config.task=custom": ["config.data.path is set, but config.task 'custom' does not read it"],
    "--config.task=nothing.py": ["config.task 'nothing.py': there is no such file"],
    "--config.method=full+lora": ["config.method 'full+lora': 'full' stands alone and cannot be joined by '+'"],
    "--config.method=lora+fishpal": ["'fishpal' stands alone"],
    "--config.method=lora+lora": ["config.method 'lora+lora' names 'lora' twice"],
    "--config.seeds={1}": ["--config.seeds must be a tuple, such as (1, 2), got '{1}'"],
    "--config.train.weight_decay=inf": ["config.train.weight_decay must be from 0 to 100, got inf"],
    "--config.train.batch_size=1000000": ["config.train.batch_size must be from 1 to 16,384"],
    "--config.train.learning_rate=1e30": ["config.train.learning_rate must be above 0 and below 1,000,000"],
    "--config.peft.lora.rank=1000000000": ["config.peft.lora: rank must be at most 65,536"],
    "--config.peft.lora.rank_pattern=[]": ["--config.peft.lora.rank_pattern must be a JSON object"],
    "--config.peft.lora.layers=()": ["layers is empty: expected at least one layer"],
    "--config.seeds=(0,4294967296)": ["config.seeds must be a tuple of integers from 0 to 2**32 - 1"],
    "--config.peft.lora.layers=(5,)": ["5"],
    "--config.peft.lora.targets=qeury": ["qeury"],
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_argument_is_one_line(failing, config, override):
    line = failing(f"--config={config}", override)
    for part in OVERRIDES[override]:
        assert part in line


def test_a_flag_given_twice_is_refused(failing, config):
    assert failing(f"--config={config}", "--config.seeds=(1,)", "--config.seeds=(2,)").endswith(
        "--config.seeds is given twice"
    )


def test_a_pattern_is_set_by_its_json(tmp_path, config, capsys):
    work = tmp_path / "work"
    arguments = [f"--config={config}", f"--workdir={work}", '--config.peft.lora.rank_pattern={"layer_0/.*/query": 3}']
    assert program.main(["jpeft", *arguments]) == 0
    assert json.loads((work / "config.json").read_text())["peft"]["lora"]["rank_pattern"] == {"layer_0/.*/query": 3}
    leaves = jpeft.load(work / "seed_11" / "model").variables["peft"]["lora_0"]
    assert {name: x["a"].shape[1] for name, x in leaves.items() if "query" in name} == {
        "encoder/layer_0/attention/query": 3,
        "encoder/layer_1/attention/query": 8,
    }
    assert "--config.peft.lora.rank_pattern={" in (work / "report.md").read_text()


def test_a_message_is_no_longer_than_anyone_reads(failing, config):
    assert "neither a file nor a named plan" in failing(f"--config={config}", "--config.fishpal.plan=" + 9999 * "[")
    line = failing(f"--config={config}", "--config.model=" + 9999 * "m" + "/end")
    assert "mmm ... mmm" in line
    assert len(line) < 1100


def test_a_full_disk_is_one_line(failing, config, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("jpeft.core.files.write_text", full)
    assert "No space left on device: 'somewhere'" in failing(f"--config={config}")


def test_a_bug_is_no_line(config, tmp_path, monkeypatch):
    """Whatever is not the user's to mend comes with its traceback."""

    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("jpeft.run.experiment.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        program.main(["jpeft", f"--config={config}", f"--workdir={tmp_path / 'work'}"])


def test_a_run_asked_to_stop_before_it_trains_exits_with_0(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jpeft.run.experiment.run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert program.main(["jpeft", f"--config={config}", f"--workdir={tmp_path / 'work'}"]) == 0
    assert capsys.readouterr().err.strip().endswith("the same command resumes")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["jpeft", "--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"jpeft {jpeft.__version__}\n"


def test_the_config_is_missing(failing):
    assert "--config is missing: for example" in failing()
    assert "--config is empty: for example" in failing("--config=")


def test_a_config_file_that_does_not_exist(failing, config):
    assert "does not exist: did you mean" in failing(f"--config={config.parent / 'tinny.py'}")
    assert "'/nowhere/x.py' does not exist" in failing("--config=/nowhere/x.py")
    assert "--config lora is neither a file nor METHOD,TASK: for example lora,mrpc" in failing("--config=lora")


def test_an_unknown_variant(failing, config):
    assert failing(f"--config={config}:dmo") == "error: config variant 'dmo' is unknown: did you mean 'demo'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "SyntaxError: invalid syntax"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return None\n", "get_config() returned NoneType, expected a ConfigDict"),
        ("def get_config():\n    return {'task': 'mrpc'}\n", "get_config() returned dict"),
        ("def get_config():\n    raise SystemExit(0)\n", "SystemExit: 0"),
        (
            "import ml_collections as m\ndef get_config():\n    return m.ConfigDict({'task': 'mrpc'})\n",
            "the config lacks data, fishpal",
        ),
    ],
)
def test_a_config_file_that_cannot_be_run(failing, config, text, message):
    config.write_text(text)
    line = failing(f"--config={config}")
    assert "tiny.py" in line
    assert message in line


def test_a_model_folder_without_weights(failing, config, tmp_path, tiny_model):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert "has no model.safetensors" in failing(f"--config={config}", f"--config.model={tmp_path / 'bare'}")


def test_a_data_folder_without_the_split(failing, config, tmp_path, tiny_glue):
    folder = tmp_path / "glue" / "mrpc"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes((tiny_glue / "mrpc" / "train.jsonl").read_bytes())
    assert "no 'validation' split" in failing(f"--config={config}", f"--config.data.path={tmp_path / 'glue'}")


def test_labels_that_do_not_fit(failing, config, tmp_path, tiny_glue):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "mrpc").symlink_to(tiny_glue / "stsb")
    line = failing(f"--config={config}", f"--config.data.path={tmp_path / 'glue'}")
    assert "train.jsonl, row 1: label 4." in line
    assert "is none of 0 (not_equivalent), 1 (equivalent)" in line


def test_a_workdir_of_another_config(failing, config, tmp_path):
    (tmp_path / "work" / "seed_11" / "model").mkdir(parents=True)
    files.write_record(
        tmp_path / "work" / "config.json", "config of a run", {"task": "mrpc", "train": {"num_epochs": 9}}
    )
    (tmp_path / "work" / ".lock").touch()
    line = failing(f"--config={config}")
    assert "belongs to another config" in line
    assert "config.train.num_epochs was 9, now 1" in line


def test_a_mistake_leaves_the_workdir_to_its_correction(failing, config, tmp_path, capsys):
    failing(f"--config={config}", "--config.data.path=./nowhere")
    assert program.main(["jpeft", f"--config={config}", f"--workdir={tmp_path / 'work'}"]) == 0
    assert (tmp_path / "work" / "report.md").is_file()


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(capsys, flag):
    with pytest.raises(SystemExit) as exited:
        program.main(["jpeft", flag])
    assert exited.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("python -m jpeft.main --config configs/", "--workdir", "num_epochs=10", "max_length=128", ":demo"):
        assert part in out
    assert "  # passes over the training rows.\n  --config.train.num_epochs=10\n" in out


def test_a_real_process_fails_with_one_line(config, tmp_path):
    # After the data are loaded, when every library has had its chance to print something.
    command = [sys.executable, "-m", "jpeft.main", "--config", config, "--config.peft.lora.targets=qeury"]
    done = subprocess.run(
        [*command, "--workdir", tmp_path / "work"], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_pattern_that_is_there_twice_is_refused(config, tmp_path, capsys):
    twice = '--config.peft.lora.rank_pattern={"layer_0.*": 4, "layer_0.*": 5}'
    assert program.main(["jpeft", "--config", str(config), "--workdir", str(tmp_path / "work"), twice]) == 2
    assert "must be a JSON object without duplicate names" in capsys.readouterr().err


def test_a_config_file_without_its_function_is_refused(tmp_path, capsys):
    (tmp_path / "empty.py").write_text("")
    assert program.main(["jpeft", "--config", str(tmp_path / "empty.py"), "--workdir", str(tmp_path / "work")]) == 2
    assert "does not define get_config()" in capsys.readouterr().err


def test_a_folder_in_the_place_of_a_file_is_named(config, tmp_path, capsys):
    (tmp_path / "work" / "config.json").mkdir(parents=True)
    (tmp_path / "work" / ".lock").touch()
    assert program.main(["jpeft", "--config", str(config), "--workdir", str(tmp_path / "work")]) == 2
    assert "config.json is a folder, where a file is to be written: delete it" in capsys.readouterr().err


def test_a_folder_that_is_read_is_not_to_be_deleted(tmp_path, capsys):
    assert command.call(lambda _: open(tmp_path).close(), []) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is a folder, expected a file\n"


def test_it_ends_without_a_word_when_nobody_reads_any_more(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert program.main(["jpeft", "--help"]) == 141
    assert capsys.readouterr().err == ""


def test_method_and_task_need_no_file(tmp_path, tiny_config, tiny_model, tiny_glue, monkeypatch, capsys):
    """As where jpeft was installed from a wheel, away from the repository."""
    monkeypatch.chdir(tmp_path)
    given = [f"--config.model={tiny_model}", f"--config.data.path={tiny_glue}", "--config.train.max_length=16"]
    given += ["--config.train.num_epochs=1", "--config.seeds=(1,)"]
    assert program.main(["jpeft", "--config", "lora,mrpc", *given]) == 0
    assert json.loads((tmp_path / "runs" / "lora_mrpc" / "report.json").read_text())["method"] == "lora"
    capsys.readouterr()
    assert program.main(["jpeft", "--config=lroa,mrpc"]) == 2
    assert "did you mean 'lora'" in capsys.readouterr().err


def test_own_files_need_no_python(tmp_path, tiny_config, tiny_model, capsys):
    lines = ["review,stars", *(f"the {'dog' if i % 2 else 'cat'} runs,{'good' if i % 2 else 'bad'}" for i in range(40))]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    given = [f"--config.model={tiny_model}", "--config.train.max_length=16", "--config.train.num_epochs=1"]
    given += [f"--config.data.train={tmp_path / 'train.csv'}", "--config.data.text=review", "--config.data.label=stars"]
    work = tmp_path / "work"
    assert program.main(["jpeft", "--config=lora,custom", *given, "--config.seeds=(1,)", f"--workdir={work}"]) == 0
    report = json.loads((work / "report.json").read_text())
    assert set(report["metrics"]["mean"]) == {"accuracy", "macro_f1"}
    assert json.loads((work / "seed_1" / "model" / "jpeft.json").read_text())["labels"] == ["bad", "good"]
    capsys.readouterr()
    assert program.main(["jpeft", "--config=lora,custom", *given[:-1], f"--workdir={work}2"]) == 2
    assert "train.csv, row 1: no column 'label'" in capsys.readouterr().err
