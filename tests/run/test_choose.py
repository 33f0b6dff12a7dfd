import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import CHEAP
from heard import run

from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.run import choose as choice
from jpeft.run import measured
from jpeft.run.console import Console


def case(folder, tokens):
    """Five rows of different lengths, whose tokens are told by `tokens`."""
    ids = tuple(np.full(n, t, np.int32) for n, t in zip((3, 14, 2, 13, 1), tokens, strict=True))
    train = Examples(ids, tuple(0 * x for x in ids), np.arange(5, dtype=np.int32), 0)
    base, data = (
        SimpleNamespace(params={"w": np.ones(2)}),
        SimpleNamespace(train=train, longest=14, task=SimpleNamespace(kind="classification")),
    )
    return SimpleNamespace(
        config=SimpleNamespace(model="m", task="mrpc"), seed=3, base=base, data=data, folder=folder,
        key=jax.random.key(0), console=Console(quiet=True),
    )  # fmt: skip


def test_examples_keep_their_numbers_and_other_data_are_known_as_such(tmp_path, monkeypatch):
    """Rows are sorted by length, and a message about one of them names its place in the training set."""
    seen = []

    def measure(path, about, console, fn, tree, groups, *rest, ids, **options):
        labels = np.concatenate([group.labels for group in groups])
        assert ids == labels.tolist()  # the label of a row is its number here
        assert [group.input_ids.shape for group in groups] == [(3, 8), (2, 14)]
        seen.append(about)
        return tree

    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "read", lambda path: ({}, {}))
    monkeypatch.setattr(measured.plots, "fisher_map", lambda *args: None)
    for tokens in ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5), (1, 2, 9, 4, 5)):
        measured.information(case(tmp_path, tokens), "fisher.safetensors", None, {"w": np.ones(2)}, 5)
    assert seen[0] == seen[1] != seen[2]
    assert {**seen[0], "rows": ""} == {**seen[2], "rows": ""}


def test_a_sample_is_in_the_order_of_the_shuffle_not_of_the_lengths(tmp_path):
    """So that the first rows of a sample are not the shortest, and a smaller sample is the start of a larger one."""
    seed = case(tmp_path, (1, 2, 3, 4, 5))
    batch = choice._sample(seed, 5)
    assert batch.labels.tolist() == np.random.default_rng(3).permutation(5).tolist()
    assert np.diff(batch.attention_mask.sum(1)).min() < 0
    few = choice._sample(seed, 3)
    np.testing.assert_array_equal(few.labels, batch.labels[:3])
    np.testing.assert_array_equal(few.input_ids, batch.input_ids[:3, : few.input_ids.shape[1]])


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_measured(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("fishpal")
    config.fishpal.update(budget="5")
    monkeypatch.setitem(choice.CRITERIA, "thesis", None)
    with pytest.raises(UserError, match="the budget of 5 parameters is too small: the smallest module has"):
        run(config, tmp_path)


def test_only_what_fits_the_budget_in_all_layers_races(tiny_config, tmp_path, monkeypatch):
    config, asked = tiny_config("fishpal"), []
    config.fishpal.update(criterion="race", num_examples=None, budget="270")

    def race(seed, candidates):
        asked.append(list(candidates))
        raise UserError("far enough")

    monkeypatch.setitem(choice.CRITERIA, "race", race)
    with pytest.raises(UserError, match="far enough"):
        run(config, tmp_path / "one")
    assert asked == [["lora"]]
    config.fishpal.budget = "50"
    says = r"the budget of 50 parameters is too small for a race, .*: \w+ has \d+ there. Add smaller sizes"
    with pytest.raises(UserError, match=says):
        run(config, tmp_path / "two")
    assert len(asked) == 1


MEASURED = """
import json
import sys
from pathlib import Path
import jax
from jpeft.importance import fisher
from jpeft.run import choose, config as configs, criteria, loading, measured, seed
from jpeft.run.console import Console

sizes = []
def recorded(*args, mesh=None, accumulate=fisher.accumulate, **options):
    sizes.append(1 if mesh is None else mesh.size)
    return accumulate(*args, mesh=mesh, **options)
fisher.accumulate = measured.accumulate = recorded

model, data, work = sys.argv[1:]
config = configs.default("mrpc", "fishpal")
config.model, config.data.path = model, data
config.train.update(max_length=16)
config.fishpal.update(criterion="thesis", num_examples=8, candidates=("lora",))
config.peft.lora.update(rank=2)
console = Console(quiet=True)
folder = Path(work, str(jax.device_count()))
begun = seed.begin(config, 1, *loading.load(config, console)[:2], folder, console)
choose.plan(begun)
found = criteria.CRITERIA["adam_step"](begun, configs.candidates(config), None)
print(json.dumps({"devices": sizes, "scores": [row["lora"] for row in found.scores.values()]}))
"""


@pytest.mark.slow
def test_all_devices_measure(tiny_config, tmp_path):
    """What three devices measure together, for the thesis' rule and by halves for another, is what one measures."""
    config = tiny_config("fishpal")
    found, scores = [], []
    for devices in (1, 3):
        flags = f"--xla_force_host_platform_device_count={devices} {CHEAP}"
        arguments = [sys.executable, "-c", MEASURED, config.model, config.data.path, str(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": flags})
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout.splitlines()[-1])
        assert set(printed["devices"]) == {devices}
        assert len(printed["devices"]) == 3
        scores.append(printed["scores"])
        found.append(choice.read(tmp_path / str(devices) / "seed_1" / "fisher.safetensors")[0])
    jax.tree.map(lambda one, three: np.testing.assert_allclose(three, one, rtol=1e-4), *found)
    np.testing.assert_allclose(*scores, rtol=1e-3)
