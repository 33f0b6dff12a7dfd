"""The scripts under launch/: what they start, with programs that only write down how they were called."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import CHEAP

from jpeft import main as program

# ml_collections loads the config file with it.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
# Writes down its name, its arguments and the GPUs it is told of. With an argument "bad" it fails, with "long" it lasts.
FAKE = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf 'gpus=%s\\0' "${JAX_LOCAL_DEVICE_IDS-}"; printf '\\036'; } >> "$RECORD"
for last; do
  case $last in
    bad) exit 3 ;;
    long) trap 'echo saved >> "$RECORD.saved"; exit 0' TERM; for i in {1..500}; do sleep 0.02; done ;;
  esac
done
[ "${0##*/}" != srun ] || { while [[ $1 == --* ]]; do shift; done; "$@"; }
"""
ODD = ["--config.data.text=it's", "--config.seeds=(1, 2)", '--config.x="$HOME `id`"', "--config.y=*;\\", "--config.z=é"]


@pytest.fixture
def call(tmp_path):
    """Runs a script in an empty folder; gives its exit code, its errors and the calls of other programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "srun", "gcloud"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    record = tmp_path / "record"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    environment |= {
        "PATH": f"{programs}:{environment['PATH']}",
        "RECORD": str(record),
        "PYTHON": str(programs / "python"),
    }

    def run(script, *args, wait=True, **more):
        record.unlink(missing_ok=True)
        options = {"cwd": tmp_path, "env": {**environment, **more}, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*HEARING, LAUNCH / script, *map(str, args)], **options)
        if not wait:
            return process
        _, err = process.communicate(timeout=30)
        lines = record.read_bytes().decode().split("\0\x1e") if record.is_file() else [""]
        return process.returncode, err, [line.split("\0") for line in lines[:-1]]

    run.record = record
    return run


# What a shell starts in the background ignores Ctrl-C, and so would all that it starts.
HEARING = [
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
]


def started(config, workdir, *rest):
    return ["python", "-m", "jpeft.main", "--config", config, "--workdir", workdir, *rest]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_arguments_is_one_line(call, script):
    code, err, calls = call(script.name)
    assert (code, calls) == (2, [])
    assert err.count("\n") == 1
    assert f"launch/{script.name}" in err


def test_slurm(call, tmp_path):
    code, _, calls = call("slurm.sh", "lora,mrpc", "runs/my own", *ODD, SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 0
    assert [line[:-1] for line in calls] == [started("lora,mrpc", "runs/my own", *ODD)]
    assert call("slurm.sh", "lora,mrpc", "bad")[0] == 3
    assert "#SBATCH --signal=B:TERM@120\n" in (LAUNCH / "slurm.sh").read_text()


RUNS = """# the first
configs/a.py runs/a

  # the second
\tfishpal,mrpc   'runs/my own'  --config.seeds="(1, 2, 3)" --config.model="it's" --config.x=\\$HOME`id`\r
configs/c.py bad
configs/d.py runs/d"""  # no end of the last line
PARSED = [
    started("configs/a.py", "runs/a"),
    started("fishpal,mrpc", "runs/my own", "--config.seeds=(1, 2, 3)", "--config.model=it's", "--config.x=$HOME`id`"),
    started("configs/c.py", "bad"),
    started("configs/d.py", "runs/d"),
]


def test_an_array_has_a_run_for_each_line(call, tmp_path):
    (tmp_path / "my runs.txt").write_text(RUNS)
    for number, expected in enumerate(PARSED, 1):
        code, err, calls = call("slurm_array.sh", "my runs.txt", SLURM_ARRAY_TASK_ID=str(number))
        assert (code, err) == (3 if number == 3 else 0, "")
        assert [line[:-1] for line in calls] == [expected]


def test_the_array_is_as_long_as_its_header_says(tmp_path):
    text = (LAUNCH / "slurm_array.sh").read_text()
    (line,) = [line for line in text.splitlines() if "sbatch --array=1-$(" in line and line.startswith("#")]
    (tmp_path / "runs.txt").write_text(RUNS)
    count = line.split("1-", 1)[1].rsplit(" launch", 1)[0]
    assert subprocess.check_output(["bash", "-c", f"echo {count}"], cwd=tmp_path, text=True) == "4\n"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        ("0", "no run 0 in 'runs.txt', which has 4: submit with --array=1-4"),
        ("5", "no run 5 in 'runs.txt', which has 4"),
        ("", "SLURM_ARRAY_TASK_ID is '', expected a number from 1"),
        ("x", "SLURM_ARRAY_TASK_ID is 'x'"),
        ("99999999999999999999", "SLURM_ARRAY_TASK_ID is '99999999999999999999'"),
    ],
)
def test_a_line_that_is_not_there(call, tmp_path, number, told):
    (tmp_path / "runs.txt").write_text(RUNS)
    code, err, calls = call("slurm_array.sh", "runs.txt", SLURM_ARRAY_TASK_ID=number)
    assert (code, calls, err.count("\n")) == (2, [], 1)
    assert err.startswith("error: ")
    assert told in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no file 'runs.txt': expected one with a line CONFIG WORKDIR"),
        ("# nothing\n\n", "'runs.txt' has no runs"),
        ("lora,mrpc\n", "run 1 of 'runs.txt' is 'lora,mrpc', expected CONFIG WORKDIR"),
        ("lora,mrpc 'runs/a\n", "run 1 of 'runs.txt' has a quote without its other"),
    ],
)
@pytest.mark.parametrize("script", ["slurm_array.sh", "local.sh"])
def test_a_file_that_is_no_list_of_runs(call, tmp_path, script, text, told):
    if text is not None:
        (tmp_path / "runs.txt").write_text(text)
    code, err, calls = call(script, "runs.txt", SLURM_ARRAY_TASK_ID="1")
    assert calls == []
    assert err.startswith(f"error: {told}")
    reached = script == "local.sh" and text is not None and "runs.txt' has no" not in told
    assert (code, err.count("\n")) == ((1, 2) if reached else (2, 1))  # a run that failed, and its line at the end


@pytest.mark.parametrize("gpus", ["3", None])
def test_nodes(call, gpus):
    more = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    code, _, (srun, python) = call("slurm_nodes.sh", "lora,mrpc", "runs/my own", *ODD, **more)
    assert code == 0
    assert srun[:3] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert python[:-1] == started("lora,mrpc", "runs/my own", "--distributed", "auto", *ODD)
    assert python[-1] == ("gpus=0,1,2" if gpus else "gpus=")
    assert call("slurm_nodes.sh", "lora,mrpc", "bad")[0] == 3
    assert "#SBATCH --signal=TERM@120\n" in (LAUNCH / "slurm_nodes.sh").read_text()  # to the steps


def test_a_pod(call, tmp_path):
    code, _, (gcloud,) = call("tpu_pod.sh", "pod", "us-east1-d", "lora,mrpc", "/mnt/my own", *ODD, JPEFT_DIR="my code")
    assert code == 0
    assert gcloud[:-3] == ["gcloud", *shlex.split("compute tpus tpu-vm ssh pod --zone us-east1-d --worker=all")]
    assert gcloud[-3] == "--command"
    (tmp_path / "my code").mkdir()  # the shell of a worker reads the command
    subprocess.run(["bash", "-c", gcloud[-2]], cwd=tmp_path, env={**os.environ, "RECORD": str(call.record)}, check=True)
    ran = call.record.read_bytes().decode().split("\0\x1e")[1].split("\0")
    assert ran[:-1] == started("lora,mrpc", "/mnt/my own", "--distributed", "auto", *ODD)
    assert call("tpu_pod.sh", "bad", "zone", "lora,mrpc", "/mnt/a")[0] == 3


def test_one_after_the_other_here(call, tmp_path):
    (tmp_path / "runs.txt").write_text(RUNS)
    code, err, calls = call("local.sh", "runs.txt", SLURM_SUBMIT_DIR="/elsewhere")
    assert [line[:-1] for line in calls] == PARSED
    assert (code, err) == (1, "run 3 of 4 failed with exit code 3\n")
    (tmp_path / "runs.txt").write_text("lora,mrpc runs/a")
    assert call("local.sh", "runs.txt")[:2] == (0, "")


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_here_saves_when_it_is_stopped(call, tmp_path, sent, expected):
    (tmp_path / "runs.txt").write_text("lora,mrpc long\nlora,mrpc runs/never")
    process = call("local.sh", "runs.txt", wait=False)
    until = time.monotonic() + 20
    while not (call.record.is_file() and call.record.read_bytes().endswith(b"\x1e")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)  # the trap is set
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (expected, "stopped; the same command resumes\n")
    assert Path(f"{call.record}.saved").read_text() == "saved\n"
    assert b"never" not in call.record.read_bytes()


@pytest.fixture(scope="module")
def ray_sweep():
    spec = spec_from_file_location("ray_sweep", LAUNCH / "ray_sweep.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = ["--workdir", "runs/sweep", "--configs", "lora,mrpc", "head,mrpc", "--seeds", "1", "2"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([], "required: --workdir, --configs, --seeds"),
        ([*GOOD, "--gpu", "1"], "unknown argument '--gpu': did you mean 'gpus'"),
        ([*GOOD, "--config.train.num_epochs=3"], "fields of the config stand at the end, after a --"),
        ([*GOOD, "--", "stray"], "'stray' after --: expected fields of the config"),
        ([*GOOD, "--", "--workdir=x"], "'--workdir=x' after --"),
        ([*GOOD, "--", "--config.seeds=(1,)"], "a sweep has --seeds in its place"),
        ([*GOOD, "--", "--config.train.num_epoch=3"], "config.train.num_epoch is not a field"),
        ([*GOOD, "--", "--config.train.num_epochs=0"], "config.train.num_epochs"),
        ([*GOOD, "1"], "--seeds: 1 is there twice"),
        ([*GOOD, "one"], "argument --seeds: invalid int value: 'one'"),
        ([*GOOD, "-1"], "config.seeds must be"),
        ([*GOOD, "--cpus", "0"], "--cpus must be at least 1, got 0"),
        ([*GOOD[:3], "lroa,mrpc", "--seeds", "1"], "did you mean 'lora'"),
        ([*GOOD[:3], "lora,mrpc", "lora,mrpc", "--seeds", "1"], "--configs: lora,mrpc is there twice"),
        ([*GOOD[:3], "lora,mrpc", "lora_mrpc.py", "--seeds", "1"], "two are called lora_mrpc"),
        ([*GOOD[:3], "configs/lora_mprc.py", "--seeds", "1"], "does not exist"),
        (["--workdir", "a_run/sweep", *GOOD[2:]], "a_run holds a run: choose a folder beside it"),
    ],
)
def test_a_wrong_argument_of_a_sweep_is_one_line(ray_sweep, tmp_path, monkeypatch, capsys, changed, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "inputs.json").touch()
    shutil.copy(LAUNCH.parent / "configs" / "lora_mrpc.py", tmp_path)
    monkeypatch.setattr(ray_sweep, "find_spec", lambda _: True)
    monkeypatch.setattr(ray_sweep, "sweep", lambda *_: pytest.fail("it started"))
    assert ray_sweep.main(["ray_sweep", *changed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_sweep_without_ray_says_what_to_install(ray_sweep, monkeypatch, capsys):
    monkeypatch.setattr(ray_sweep, "find_spec", lambda _: None)
    assert ray_sweep.main(["ray_sweep", *GOOD]) == 2
    assert capsys.readouterr().err.startswith("error: Ray is not installed: pip install")


def test_failures_are_listed_at_the_end(ray_sweep, monkeypatch, capsys):
    monkeypatch.setattr(ray_sweep, "find_spec", lambda _: True)
    monkeypatch.setattr(ray_sweep, "sweep", lambda todo, _: dict.fromkeys(todo, "no space"))
    with pytest.raises(SystemExit) as exited:
        ray_sweep.main(["ray_sweep", *GOOD])
    assert exited.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "failed: lora_mrpc seed 1: no space (see runs/sweep/lora_mrpc_seed_1/log.txt)"
    assert len(lines) == 4


def test_a_worker_that_was_asked_to_stop_is_not_done(ray_sweep, tmp_path, monkeypatch):
    for name in ("PJRT_NPROC", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # put back in the end
    folder = str(tmp_path / "work")
    monkeypatch.setattr(program, "main", lambda _: 0)
    with pytest.raises(InterruptedError):
        ray_sweep.train([], folder, os.getcwd(), 1, 0)

    def broken(_):
        print("before")
        raise RuntimeError("a bug")

    monkeypatch.setattr(program, "main", broken)
    assert ray_sweep.train([], folder, os.getcwd(), 1, 0) == "RuntimeError: a bug"
    assert (tmp_path / "work" / "log.txt").read_text().startswith("before\nTraceback")


EPOCHS = 12


@pytest.fixture
def config(tmp_path, tiny_config, tiny_model, tiny_glue):
    path = tmp_path / "tiny.py"
    path.write_text(
        "from jpeft.run import config as c\n"
        "def get_config():\n"
        "    config = c.default('mrpc', 'lora')\n"
        f"    config.model, config.data.path = {str(tiny_model)!r}, {str(tiny_glue)!r}\n"
        f"    config.train.update(num_epochs={EPOCHS}, max_length=16)\n"
        "    config.peft.lora.dropout = 0.1\n"
        "    return config\n"
    )
    return path


def test_a_table_has_a_row_for_each_config(ray_sweep, config, tmp_path, capsys):
    given = ["--config.train.num_epochs=1"]
    todo = ray_sweep.runs(tmp_path / "sweep", [str(config)], [1, 2], given)
    assert [run.folder.name for run in todo] == ["tiny_seed_1", "tiny_seed_2"]
    for run in todo:
        assert program.main(["jpeft.main", *run.arguments]) == 0
    head, _, baseline, row = ray_sweep.table(todo).splitlines()
    assert head.startswith("| method ")
    assert "majority class" in baseline
    assert row.startswith("| tiny ")
    assert " ± " in row


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'jpeft[ray]'")
def test_a_sweep_survives_the_loss_of_a_worker(config, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    killed, log = sweep / "tiny_seed_1", sweep / "tiny_seed_1" / "metrics.jsonl"

    def epochs():
        return log.read_text().count("train_loss") if log.is_file() else 0

    more = {"XLA_FLAGS": CHEAP, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, LAUNCH / "ray_sweep.py", "--workdir", "sweep", "--configs", config.name, "--seeds", "1"]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:  # sockets want a short name
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
        process = subprocess.Popen(command, env={**os.environ, **more, "RAY_TMPDIR": scratch}, **options)
        until = time.monotonic() + 120
        while epochs() < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        worker = int((killed / ".lock").read_text().split()[1])
        os.kill(worker, signal.SIGKILL)
        assert 2 <= epochs() < EPOCHS
        printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed
    assert "tiny seed 1: finished" in printed
    assert "| tiny " in printed
    said = (killed / "log.txt").read_text()
    assert said.count("lora on mrpc") == 2, said
    assert "resuming at step" in said

    whole = tmp_path / "whole"
    assert program.main(["jpeft.main", f"--config={config}", "--config.seeds=(1,)", f"--workdir={whole}"]) == 0
    for name in ("metrics.jsonl", "seed_1/model/modules.safetensors", "seed_1/predictions.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (killed, whole)]
    assert reports[0]["metrics"] == reports[1]["metrics"]
