"""A run on a quantised base, from its config to what it leaves: resumed, loaded, refused, exported."""

import contextlib
import itertools
import re

import numpy as np
import pytest
from heard import Heard, run

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves
from jpeft.core.quantised import holds_quantised
from jpeft.run import train as running
from jpeft.run.stopping import Stopped
from jpeft.serving import export

TEXTS = [("the dog", "a cat"), ("big tree", "a big red house")]


@pytest.fixture(scope="module")
def config_of(tiny_model, tiny_glue):
    def make(**fields):
        config = running.configs.default("mrpc", "lora")
        config.model, config.data.path, config.quantise = str(tiny_model), str(tiny_glue), "nf4"
        config.train.update(num_epochs=1, batch_size=16, max_length=16, padded_lengths=1)
        config.update(fields)
        return config

    return make


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(config_of(), folder)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(whole, config_of, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = itertools.count()
        patch.setattr(running, "EVENT_SECONDS", 0.0)
        patch.setattr(running, "deferred", lambda: contextlib.nullcontext(lambda: next(calls) >= 1))
        with pytest.raises(Stopped, match=r"at step [12] of 3"):
            run(config_of(), tmp_path)
    run(config_of(), tmp_path)
    for name in ("model/modules.safetensors", "predictions.safetensors"):
        assert (tmp_path / "seed_11" / name).read_bytes() == (whole[0] / "seed_11" / name).read_bytes()


def test_codes_are_made_again_and_never_saved(whole):
    workdir, report = whole
    folder = workdir / "seed_11" / "model"
    saved, wide = jpeft.load(folder), jpeft.load(folder, quantised=False)
    assert set(read_leaves(folder / "modules.safetensors")["params"]) == {"classifier"}
    assert holds_quantised(saved.variables["params"]["encoder"])
    assert not holds_quantised(wide.variables["params"])
    counts = report["parameters"]
    assert tree.count(saved.variables["params"]) == counts["base"] + counts["head"]
    logits, others = jpeft.predict(saved, TEXTS), jpeft.predict(wide, TEXTS)
    assert 1e-4 < np.abs(logits - others).max() < 1

    both = jpeft.MultiTask()
    both.add("one", saved)
    both.add("two", jpeft.load(folder))  # whose base is equal, and not the same
    np.testing.assert_allclose(np.stack(both.predict(["one", "two"], TEXTS)), logits, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="task 'three' has another base"):
        both.add("three", wide)


def test_another_base_is_one_line(whole, config_of, tmp_path):
    nf4 = whole[0] / "seed_11" / "model"
    with pytest.raises(UserError, match="trained on a base quantised as 'nf4', and this run has a base that is not"):
        run(config_of(quantise=None, init_from=str(nf4)), tmp_path / "from")
    coded = jpeft.load(nf4)
    plain = coded._replace(**jpeft.load(nf4, quantised=False)._asdict())
    with pytest.raises(UserError, match="and the loaded model has a base that is not quantised: load it with quant"):
        jpeft.load(nf4, base=plain)
    beside = jpeft.load(nf4, base=plain, quantised=False)
    np.testing.assert_array_equal(jpeft.predict(beside, TEXTS), jpeft.predict(plain, TEXTS))
    kernel = "encoder/layer_0/attention/query/kernel"
    moved = plain._replace(
        variables={**plain.variables, "params": tree.replace(plain.variables["params"], kernel, lambda x: x + 1)}
    )
    with pytest.raises(UserError, match="was trained on another base than the loaded model"):
        jpeft.load(nf4, base=moved, quantised=False)


def test_a_merged_export_has_the_dequantised_weights(whole, tmp_path):
    (drift, _) = export.export(whole[0], "hf", tmp_path / "hf", Heard())
    assert drift.largest < 1e-4
    card = (tmp_path / "hf" / "README.md").read_text()
    assert re.search("quantised as nf4; what is here has these kernels, dequantised", card)
    (drift, _) = export.export(whole[0], "peft", tmp_path / "peft", Heard())
    assert drift.largest > 1e-4  # on the base as it was, which is what peft loads
    assert "is put on the weights as they were before" in (tmp_path / "peft" / "README.md").read_text()


def test_a_pattern_that_matches_no_kernel_is_one_line(config_of, tmp_path):
    with pytest.raises(UserError, match=r"config\.quantise_except: exceptions 'qeury' match none of the layers"):
        run(config_of(quantise_except="qeury"), tmp_path)
