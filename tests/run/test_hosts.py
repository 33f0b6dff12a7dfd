"""Two real processes on one machine, that train one run together."""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import CHEAP

from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves
from jpeft.run import experiment, hosts
from jpeft.run.console import Console
from jpeft.store.model_folder import WEIGHTS

PROGRAM = """
import sys
from pathlib import Path
from ml_collections import ConfigDict
from jpeft.run import command, config as c, experiment, hosts, train

def main(argv):
    how, model, data, work, epochs = argv[1:]
    hosts.join(how)
    train.EVENT_STEPS = 2
    config = c.default("mrpc", "lora")
    config.model, config.data.path, config.seeds, config.peft.lora.rank = model, data, (1,), 2
    config.train.update(num_epochs=int(epochs), max_length=16, shard_base=True)
    experiment.run(config, Path(work))

sys.exit(command.call(main, sys.argv))
"""
EPOCHS = 17  # of three steps: 51


TOLD = """
import os, signal, sys, time
from jpeft.run import command, hosts

def main(argv):
    hosts.join(argv[1])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)

sys.exit(command.call(main, sys.argv))
"""


@pytest.mark.slow
def test_a_signal_before_the_training_is_heard():
    """JAX's own service would take it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TOLD, f"127.0.0.1:{port},1,0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "stopped before training" in done.stdout + done.stderr


@pytest.fixture
def start(tiny_config):
    """Starts two processes; both end with the test."""
    config = tiny_config("lora")
    running = []

    def both(work, data=(None, None), epochs=EPOCHS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        own = {"TMPDIR": str(work.parent), "XLA_FLAGS": CHEAP, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = {**os.environ, **own}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        for number in (0, 1):
            how, rows = f"{address},2,{number}", str(data[number] or config.data.path)
            command = [sys.executable, "-u", "-c", PROGRAM, how, str(config.model), rows, str(work), str(epochs)]
            running.append(subprocess.Popen(command, env=environment, **options))
        return running[-2:]

    yield both
    for process in running:
        process.kill()
        process.communicate()


def ended(processes):
    """Exit codes, and what was printed."""
    found = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], [out + err for out, err in found], found


@pytest.mark.slow
def test_two_processes_stop_and_resume_and_end_as_one_does(tiny_config, start, tmp_path):
    config = tiny_config("lora", num_epochs=EPOCHS)
    config.seeds = (1,)
    experiment.run(config, tmp_path / "one", Console(quiet=True))

    work = tmp_path / "two"
    first, second = start(work)
    for line in first.stdout:
        if line.startswith("  ") and "epoch  2" in line:
            break
    second.send_signal(signal.SIGTERM)  # one of them hears it, both stop
    codes, said, _ = ended([first, second])
    assert codes == [0, 0], said
    assert all("stopped and saved at step" in told for told in said), said
    assert not (work / "seed_1" / "result.json").exists()

    codes, said, printed = ended(start(work))
    assert codes == [0, 0], said
    assert "2 devices: rows divided among them, the base model in parts on them" in printed[0][0]
    assert "resuming at step" in printed[0][0]
    assert "resuming" not in printed[1][0]
    assert not list(tmp_path.glob("jpeft-*"))

    def rows(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {(row["seed"], row["step"]): row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row}

    assert max(step for _, step in rows("one")) >= 50
    assert rows("two") == pytest.approx(rows("one"), rel=1e-5)
    folders = [tmp_path / name / "seed_1" for name in ("one", "two")]
    logits = [read_leaves(folder / experiment.PREDICTIONS)["logits"] for folder in folders]
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert (folders[1] / "model" / WEIGHTS).is_file()


@pytest.mark.slow
def test_processes_with_other_data_are_refused(tiny_glue, start, tmp_path):
    shutil.copytree(tiny_glue, tmp_path / "other")
    rows = (tmp_path / "other" / "mrpc" / "train.jsonl").read_text().splitlines()
    (tmp_path / "other" / "mrpc" / "train.jsonl").write_text("\n".join(rows[1:]))
    codes, said, _ = ended(start(tmp_path / "work", (None, tmp_path / "other")))
    assert codes == [2, 2], said
    told = "error: the inputs of this process differ from the first one's: the training data: 45 rows, now 44"
    assert all(told in each for each in said), said


def test_the_first_hands_over_its_files(tmp_path, monkeypatch):
    for name in ("plan.json", "deep/er/x.bin", "checkpoints/1/state", "model/modules.safetensors"):
        path = tmp_path / "first" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    sent, first = [], [True]
    monkeypatch.setattr(hosts, "is_first", lambda: first[0])
    monkeypatch.setattr(hosts, "_bytes", lambda given: sent.append(given) or sent[0])
    hosts._copy(tmp_path / "first")
    first[0] = False
    hosts._copy(tmp_path / "other")
    found = {
        path.relative_to(tmp_path / "other").as_posix() for path in (tmp_path / "other").rglob("*") if path.is_file()
    }
    assert found == {"plan.json", "deep/er/x.bin"}


@pytest.mark.parametrize("given", ["", "yes", "host:1,2", "host:1,2,2", "host:1,x,0", "host,2,0", "host:1,2,0,0"])
def test_what_is_neither_auto_nor_an_address(given):
    with pytest.raises(UserError, match=r"--distributed .*: expected auto, or HOST:PORT,COUNT,INDEX"):
        hosts.join(given)


def test_no_cluster_is_one_line():
    program = (
        "from jpeft.run import command, hosts; import sys; sys.exit(command.call(lambda _: hosts.join('auto'), []))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "without a cluster that JAX knows, give HOST:PORT,COUNT,INDEX" in done.stderr


@pytest.mark.parametrize(
    "error", [ValueError("UNKNOWN: Gloo AllGather failed"), jax.errors.JaxRuntimeError("ABORTED: x")]
)
def test_a_lost_process_is_one_line_and_not_waited_for(error, monkeypatch):
    at_exit = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    with (
        pytest.raises(UserError, match=r"lost another process of this run .*what was saved before is intact"),
        hosts.lost(),
    ):
        raise error
    assert at_exit == [(os._exit, 2)]
    with pytest.raises(ValueError, match="a bug"), hosts.lost():
        raise ValueError("a bug")


def test_of_a_single_process_all_is_as_without(tmp_path):
    assert not hosts.several()
    assert hosts.is_first()
    assert hosts.any_says(True, False) == (True, False)
    assert hosts.from_first({"a": 1}) == {"a": 1}
    assert hosts.in_turn(tmp_path, lambda: 3) == hosts.in_all(lambda: 3) == hosts.shared(3) == 3
    with hosts.own_folder(tmp_path) as folder:
        assert folder == tmp_path
