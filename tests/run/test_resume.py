"""Runs that are killed, in processes of their own, as they are where a machine is taken away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHEAP

from jpeft.run import experiment
from jpeft.run.console import Console

REPOSITORY = Path(__file__).parents[1]
EPOCHS = 12


@pytest.fixture
def start(tmp_path, tiny_config, tiny_model, tiny_glue):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from jpeft.run import config as c\n"
        "def get_config():\n"
        "    config = c.default('mrpc', 'lora')\n"
        f"    config.model, config.data.path = {str(tiny_model)!r}, {str(tiny_glue)!r}\n"
        f"    config.train.update(num_epochs={EPOCHS}, max_length=16)\n"
        "    config.peft.lora.dropout = 0.1\n"
        "    return config\n"
    )
    command = [sys.executable, "-m", "jpeft.main", "--config", config, "--workdir", tmp_path / "killed"]
    environment = {**os.environ, "XLA_FLAGS": CHEAP, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return lambda: subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def epochs(workdir):
    log = workdir / "metrics.jsonl"
    return log.read_text().count("train_loss") if log.is_file() else 0


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, start, tiny_config):
    workdir = tmp_path / "killed"
    process = start()
    until = time.monotonic() + 120
    # Each is saved while the next one trains.
    while epochs(workdir) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= epochs(workdir) < EPOCHS
    last = start()
    printed, _ = last.communicate(timeout=300)
    assert last.returncode == 0, printed
    assert "resuming at step" in printed

    config = tiny_config("lora", num_epochs=EPOCHS)
    config.peft.lora.rank, config.peft.lora.dropout = 8, 0.1  # the file leaves the rank as it is
    experiment.run(config, tmp_path / "whole", Console(quiet=True))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "whole")]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    models = [(tmp_path / name / "seed_11/model/modules.safetensors").read_bytes() for name in ("killed", "whole")]
    assert models[0] == models[1]
