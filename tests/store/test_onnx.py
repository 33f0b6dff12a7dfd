"""ONNX files: what ONNX Runtime computes from them, and what is no such file.

Those that need the converter are skipped where `jpeft[onnx]` is not installed.
"""

import sys

import jax
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core.errors import UserError
from jpeft.data import tokenizer as tokenizers
from jpeft.models import Bert, pretrained
from jpeft.store import onnx

# Packages of others, whose warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def converter():
    pytest.importorskip("jax2onnx", reason="needs pip install 'jpeft[onnx]'", exc_type=ImportError)


def saved(folder, method):
    loaded = pretrained.load(folder, num_labels=2, key=jax.random.key(7))
    model = Bert(loaded.config)
    sites = jpeft.sites(model, *[jax.ShapeDtypeStruct((1, 5), "int32")] * 2)
    leaves = randomised(jpeft.init(method, jax.random.key(1), sites, loaded.params))
    variables = {"params": loaded.params, "peft": leaves}
    tokenizer = tokenizers.load(folder, loaded.config.vocab_size)
    return jpeft.Saved(model, jpeft.chain(method), variables, ("a", "b"), "mrpc", 12, tokenizer, 2, folder, {})


MIXED = jpeft.chain(jpeft.lora(2), jpeft.prefix(3, None, shift_positions=True), jpeft.pfeiffer(bottleneck=4))


@pytest.mark.usefixtures("converter")
def test_a_file_serves_any_number_of_rows_of_any_length(tiny_model, tmp_path):
    """It equals what JAX computes, and the modules are in it."""
    made = saved(tiny_model, MIXED)
    onnx.write(tmp_path, made)
    assert (tmp_path / "tokenizer.json").is_file()
    run = onnx.read(tmp_path)
    for shape in ((1, 1), (4, 9), (3, 7)):
        ids = np.random.default_rng(0).integers(4, 18, shape, np.int32)
        mask = np.int32(np.arange(shape[1])[None] < np.arange(1, 1 + shape[0])[:, None])
        types = np.zeros_like(ids)
        expected = jpeft.apply(made.model, made.transform, made.variables, ids, mask, types, mask=mask)[0]
        np.testing.assert_allclose(run(ids, mask, types), expected, atol=1e-5)
        bare = made.model.apply({"params": made.variables["params"]}, ids, mask, types)[0]
        assert np.abs(bare - expected).max() > 1e-3


@pytest.mark.usefixtures("converter")
def test_what_is_no_file_of_ours(tmp_path):
    with pytest.raises(UserError, match=r"holds no ONNX file: expected model\.onnx"):
        onnx.read(tmp_path)
    (tmp_path / onnx.PROGRAM).write_bytes(b"something else")
    with pytest.raises(UserError, match="is not an ONNX file"):
        onnx.read(tmp_path)


def test_without_the_converter(tiny_model, tmp_path, monkeypatch):
    for name in ("jax2onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: onnx.write(tmp_path / "new", saved(tiny_model, jpeft.lora(2))), lambda: onnx.read(tmp_path)):
        with pytest.raises(UserError, match=r"jax2onnx and read with onnxruntime: pip install 'jpeft\[onnx\]'"):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("converter")
def test_what_the_converter_gets_wrong_is_not_written(tiny_model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise NotImplementedError("no such\noperation")

    monkeypatch.setattr("jax2onnx.to_onnx", fails)
    made, out = saved(tiny_model, jpeft.prefix(3, None)), tmp_path / "out"
    with pytest.raises(UserError, match=r"cannot convert prefix_0: export --format stablehlo \(no such operation\)"):
        onnx.write(out, made)
    monkeypatch.setattr("jax2onnx.to_onnx", lambda *args, **kwargs: None)
    monkeypatch.setattr(onnx, "_opened", lambda file: lambda ids, mask, types: np.ones((len(ids), 2), np.float32))
    with pytest.raises(UserError, match=r"made a model with other logits, by \d"):
        onnx.write(out, made)
    assert not out.exists()
