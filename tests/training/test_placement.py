"""A run on eight devices, which XLA makes of one CPU, in a process of its own.

With the base model in parts, tests/run/test_hosts.py has one.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import CHEAP

from jpeft.core.files import read_leaves
from jpeft.data.batching import Batch
from jpeft.run import experiment
from jpeft.run.console import Console
from jpeft.training import placement

EIGHT = """
import sys
from pathlib import Path
import jax
from jpeft.run import config as c, experiment
from jpeft.run.console import Console

model, data, work = sys.argv[1:]
assert jax.device_count() == 8
config = c.default("mrpc", "lora")
config.model, config.data.path, config.seeds = model, data, (1, 2)
config.train.update(num_epochs=1, max_length=16, together=2, padded_lengths=1)
config.peft.lora.update(rank=2, dropout=0.1)
experiment.run(config, Path(work, "eight"), Console())
"""


@pytest.mark.slow
def test_a_run_on_eight_devices_is_that_on_one(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("lora", num_epochs=1, padded_lengths=1)
    config.seeds, config.peft.lora.dropout = (1, 2), 0.1
    experiment.run(config, tmp_path / "one", Console(quiet=True))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {CHEAP}")
    arguments = [sys.executable, "-c", EIGHT, config.model, config.data.path, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 devices: rows divided among them, the base model on each of them" in done.stdout

    def rows(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {(row["seed"], row["step"]): row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row}

    assert rows("eight") == pytest.approx(rows("one"), rel=1e-5)
    logits = [read_leaves(tmp_path / at / "seed_1" / experiment.PREDICTIONS)["logits"] for at in ("one", "eight")]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_rows_are_divided_of_each_part_and_of_several_runs(monkeypatch):
    monkeypatch.setattr(placement, "NamedSharding", lambda _, axes: tuple(axes))
    part = Batch(*(np.zeros(shape) for shape in ((8, 4), (8, 4), (8, 4), (8,), (8,))))
    assert placement.rows(None, part) == Batch(*[("rows",)] * 5)
    words = part._replace(labels=np.zeros((8, 4)))  # labels of tokens, or of several classes
    assert placement.rows(None, words) == Batch(*[("rows",)] * 5)
    runs = jax.tree.map(lambda x: np.stack([x, x]), part)
    assert placement.rows(None, (runs, runs)) == (Batch(*[(None, "rows")] * 5),) * 2


def test_each_array_is_divided_along_its_longest_axis_that_fits():
    class Two:
        size = 4

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((3,), (8, 12), (16, 6, 5), ())]
    seen = []

    def spec(_, axes):
        return seen.append(tuple(axes)) or tuple(axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "NamedSharding", spec)
        placement.divided(Two(), shapes)
    assert seen == [(), (None, "rows"), ("rows",), ()]
