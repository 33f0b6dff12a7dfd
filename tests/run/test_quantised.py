"""A run on a quantised base, from its config to what it leaves: resumed, loaded, refused, exported."""

import json

import jax
import numpy as np
import pytest
from heard import Heard, run

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves
from jpeft.core.quantised import dense, holds_quantised
from jpeft.run import train as running
from jpeft.run.stopping import Stopped
from jpeft.serving import export

TEXTS = [("the dog", "a cat"), ("big tree", "a big red house")]


@pytest.fixture(scope="module")
def config_of(tiny_model, tiny_glue):
    def make(quantise="nf4", **options):
        config = running.configs.default("mrpc", "lora")
        config.model, config.data.path, config.quantise = str(tiny_model), str(tiny_glue), quantise
        config.train.update({"num_epochs": 2, "batch_size": 16, "max_length": 16})
        config.update(options)
        return config

    return make


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(config_of(), folder)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, config_of, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running, "EVENT_SECONDS", 0.0)
        asked = iter([False, True])
        patch.setattr(running.hosts, "any_says", lambda *said: (next(asked, True), *said[1:])[: len(said)])
        with pytest.raises(Stopped):
            run(config_of(), tmp_path)
    run(config_of(), tmp_path)
    for name in ("model/modules.safetensors", "predictions.safetensors"):
        assert (tmp_path / "seed_11" / name).read_bytes() == (whole[0] / "seed_11" / name).read_bytes()


def test_codes_are_made_again_and_never_saved(whole, config_of):
    workdir, report = whole
    folder = workdir / "seed_11" / "model"
    assert report["parameters"]["base"] == 9890 + 0 * len(json.dumps(report["recipe"]))
    kept = read_leaves(folder / "modules.safetensors")
    assert set(kept["params"]) == {"classifier"}
    saved = jpeft.load(folder)
    assert holds_quantised(saved.variables["params"]["encoder"])
    assert not holds_quantised({name: x for name, x in saved.variables["params"].items() if name != "encoder"})
    wide = jpeft.load(folder, quantised=False)
    assert not holds_quantised(wide.variables["params"])
    logits = [np.asarray(jpeft.predict(model, TEXTS)) for model in (saved, wide)]
    assert 1e-4 < np.abs(logits[0] - logits[1]).max() < 1
