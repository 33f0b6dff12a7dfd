import shutil

import jax
import numpy as np
import pytest

import jpeft
from jpeft.core import files, tree
from jpeft.core.errors import UserError
from jpeft.models import Bert, pretrained
from jpeft.plans import plan as plans
from jpeft.store import model_folder as saved

SPECS = {
    "lora": [{"method": "lora", "options": {"rank": 2}}],
    "prefix": [{"method": "prefix", "options": {"num_virtual_tokens": 3, "mlp_hidden": 8}}],
    "plan": plans.spec(
        {
            0: [plans.Entry("prefix", {"mlp_hidden": 8})],
            1: [plans.Entry("pfeiffer", {"bottleneck": 4}), plans.Entry("lora")],
        }
    ),
    "head": [],
    "full": [],
}
IDS = np.array([[2, 4, 5, 3, 0], [2, 6, 7, 8, 3]], np.int32)
MASK = (IDS > 0).astype(np.int32)


def logits(model, transform, variables, ids=IDS, mask=MASK):
    return np.asarray(jpeft.apply(model, transform, variables, ids, mask, np.zeros_like(ids), mask=mask)[0])


def make(folder, base, kind, labels=("no", "yes")):
    """Saves modules with random values; the logits they gave before."""
    loaded = pretrained.load(base, num_labels=len(labels) or 1, key=jax.random.key(7))
    model, transform = Bert(loaded.config), plans.build(SPECS[kind])
    trained, frozen = tree.split(loaded.params, lambda path: kind == "full" or path[0] == "classifier")
    sites = jpeft.sites(model, jax.ShapeDtypeStruct((1, 5), "int32"))
    leaves = jpeft.init(transform, jax.random.key(1), sites, loaded.params)
    rng = np.random.default_rng(0)
    trainable = {"params": trained, "peft": leaves}
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), trainable)
    size = saved.save(
        folder, moved, SPECS[kind], base=loaded.source, fingerprint=pretrained.fingerprint(frozen), task="mrpc",
        identity=pretrained.identity(loaded),
        labels=labels, kind="classification" if labels else "regression", max_length=16,
        num_texts=2,
    )  # fmt: skip
    assert size == (folder / "modules.safetensors").stat().st_size
    variables = {"params": tree.union(loaded.params, moved["params"]), "peft": moved["peft"]}
    plain = logits(model, jpeft.chain(), {"params": loaded.params, "peft": {}})
    return logits(model, transform, variables), plain


@pytest.mark.parametrize("kind", SPECS)
def test_loaded_modules_give_the_same_logits(tmp_path, tiny_model, kind):
    expected, plain = make(tmp_path, tiny_model, kind)
    assert np.abs(expected - plain).max() > 1e-3
    back = jpeft.load(tmp_path)
    np.testing.assert_allclose(logits(back.model, back.transform, back.variables), expected, rtol=0, atol=1e-6)
    assert (back.labels, back.task, back.max_length, back.num_texts) == (("no", "yes"), "mrpc", 16, 2)
    assert back.base == tiny_model
    assert back.tokenizer("the dog")["input_ids"] == [2, 4, 6, 3]


def test_prefixes_are_saved_folded(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "prefix")
    leaves = jpeft.load(tmp_path).variables["peft"]["prefix_0"]
    assert set(leaves) == {f"encoder/layer_{i}/attention/core" for i in (0, 1)}
    assert {x.shape for x in jax.tree.leaves(leaves)} == {(3, 16)}


def test_only_what_trained_is_saved(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "lora")
    from safetensors.numpy import load_file

    names = set(load_file(tmp_path / "modules.safetensors"))
    sites = [f"peft:lora_0:encoder/layer_{i}/attention/{name}" for i in (0, 1) for name in ("query", "value")]
    head = {"params:classifier:kernel", "params:classifier:bias"}
    assert names == {f"{site}:{leaf}" for site in sites for leaf in ("a", "b")} | head


def test_regression_has_one_output(tmp_path, tiny_model):
    expected, _ = make(tmp_path, tiny_model, "lora", labels=())
    back = jpeft.load(tmp_path)
    assert back.labels == ()
    assert back.model.config.num_labels == 1
    np.testing.assert_allclose(logits(back.model, back.transform, back.variables), expected, rtol=0, atol=1e-6)


@pytest.fixture
def other_base(tmp_path, tiny_model):
    """A model of the same shape with another embedding."""
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(0))
    changed = tree.replace(loaded.params, "embeddings/word_embeddings/embedding", lambda x: x.at[5, 0].add(1e-3))
    pretrained.save(tmp_path / "other", loaded.config, changed, tokenizer_from=tiny_model)
    return tmp_path / "other"


@pytest.mark.parametrize("kind", ["lora", "plan", "head"])
def test_another_base_is_refused(tmp_path, tiny_model, other_base, kind):
    make(tmp_path / "model", tiny_model, kind)
    with pytest.raises(UserError, match=r"was trained on other base weights than those of .*other"):
        jpeft.load(tmp_path / "model", base=str(other_base))


def rewrite(folder, **changes):
    """Changes the description as a program that knows the format would."""
    description = files.read_record(folder / "jpeft.json", saved.KIND)
    files.write_record(folder / "jpeft.json", saved.KIND, {**description, **changes})


@pytest.mark.parametrize(
    ("old", "new"), [('"no"', '"on"'), ('"rank": 2', '"rank": 3'), ('"max_length": 16', '"max_length": 8')]
)
def test_an_edited_description_is_refused(tmp_path, tiny_model, old, new):
    make(tmp_path, tiny_model, "lora")
    text = (tmp_path / "jpeft.json").read_text()
    assert old in text
    (tmp_path / "jpeft.json").write_text(text.replace(old, new))
    with pytest.raises(UserError, match="was changed or damaged"):
        jpeft.load(tmp_path)


def test_a_folder_of_a_later_format_is_refused(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "lora")
    rewrite(tmp_path, format=2, jpeft="9.0")
    with pytest.raises(UserError, match=r"was written by jpeft 9\.0, in a format unknown"):
        jpeft.load(tmp_path)


BASE = {"name": "x", "fingerprint": "x", "config": "x"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": True}, "this version of jpeft: its format is True"),
        ({"jpeft": None}, "its jpeft is None"),
        ({"max_length": "16"}, "its max_length is '16'"),
        ({"max_length": None}, "its max_length is None"),
        ({"max_length": -5}, "its max_length is -5, expected a number from 1 to 65,536"),
        ({"max_length": 10**9}, "its max_length is 1000000000, expected a number from 1"),
        ({"num_texts": 0}, "its num_texts is 0, expected 1 for sentences or 2 for pairs"),
        ({"num_texts": 3}, "its num_texts is 3, expected"),
        ({"num_texts": True}, "its num_texts is True"),
        ({"labels": ["no", "no"]}, r"its labels is \['no', 'no'\], a name occurs twice"),
        ({"labels": ["a", "b", "c"]}, "has labels for 3 outputs, but the head has 2"),
        ({"labels": []}, "has labels for 1 outputs, but the head has 2"),
        ({"labels": [0, 1]}, r"its labels\.0 is 0"),
        ({"base": None}, "its base is None"),
        ({"base": BASE}, r"it has no base\.tokenizer"),
        ({"base": {**BASE, "tokenizer": 3}}, r"its base\.tokenizer is 3"),
        ({"modules": None}, "its modules is None"),
        ({"modules": {}}, r"its modules is \{\}"),
        ({"modules": [{"method": "lora"}]}, r"it has no modules\.0\.options"),
        ({"modules": []}, r"leaves of \['lora_0'\] do not fit a transform with \[\]"),
        ({"modules": [{"method": "pfeiffer", "options": {}}]}, r"do not fit a transform with \['pfeiffer_0'\]"),
        ({"modules": [{"method": "nope", "options": {}}]}, "method 'nope' is unknown"),
        ({"task": 3}, "its task is 3"),
        ({"answers": 3}, "its answers is 3"),
        ({"answers": "poem"}, "the answers 'poem' are unknown"),
    ],
)
def test_a_description_that_no_run_writes_is_refused(tmp_path, tiny_model, changes, says):
    """Its hash is right: anyone can compute it."""
    make(tmp_path, tiny_model, "lora")
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=says) as caught:
        jpeft.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["format", "weights", "base", "task", "labels", "max_length", "num_texts", "modules"])
def test_a_description_without_an_entry_is_refused(tmp_path, tiny_model, name):
    make(tmp_path, tiny_model, "lora")
    description = files.read_record(tmp_path / "jpeft.json", saved.KIND)
    del description[name]
    files.write_record(tmp_path / "jpeft.json", saved.KIND, description)
    with pytest.raises(UserError, match=f"is not a description of trained modules of this version of .* has no {name}"):
        jpeft.load(tmp_path)


def test_weights_without_a_head_are_refused(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "lora")
    leaves = files.read_leaves(tmp_path / "modules.safetensors")
    files.write_leaves(tmp_path / "modules.safetensors", {"peft": leaves["peft"]})
    rewrite(tmp_path, weights=files.file_hash(tmp_path / "modules.safetensors"))
    with pytest.raises(UserError, match="has labels for 2 outputs, but the head has 0"):
        jpeft.load(tmp_path)


def test_weights_of_another_folder_are_refused(tmp_path, tiny_model):
    for name in ("one", "two"):
        make(tmp_path / name, tiny_model, "prefix" if name == "one" else "lora")
    (tmp_path / "two" / "modules.safetensors").write_bytes((tmp_path / "one" / "modules.safetensors").read_bytes())
    with pytest.raises(UserError, match="belongs to another"):
        jpeft.load(tmp_path / "two")


def test_weights_that_are_not_finite_are_refused(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "lora")
    leaves = files.read_leaves(tmp_path / "modules.safetensors")
    leaves["params"]["classifier"]["bias"] = np.array([0, np.nan], np.float32)
    files.write_leaves(tmp_path / "modules.safetensors", leaves)
    rewrite(tmp_path, weights=files.file_hash(tmp_path / "modules.safetensors"))
    with pytest.raises(UserError, match="params:classifier:bias is not finite"):
        jpeft.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("config.json", '"hidden_act": "gelu"', '"hidden_act": "relu"', "the config of"),
        ("tokenizer.json", '"sees"', '"seen"', "the tokenizer of"),
    ],
)
def test_a_base_of_another_shape_or_tokenizer_is_refused(tmp_path, tiny_model, file, old, new, says):
    """Its weights may be the same ones."""
    make(tmp_path / "model", tiny_model, "lora")
    shutil.copytree(tiny_model, tmp_path / "base")
    text = (tmp_path / "base" / file).read_text()
    assert old in text
    (tmp_path / "base" / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=says):
        jpeft.load(tmp_path / "model", base=str(tmp_path / "base"))


def test_a_base_that_moved_is_named(tmp_path, tiny_model):
    expected, _ = make(tmp_path / "model", tiny_model, "plan")
    base = files.read_record(tmp_path / "model" / "jpeft.json", saved.KIND)["base"]
    rewrite(tmp_path / "model", base={**base, "name": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone"):
        jpeft.load(tmp_path / "model")
    back = jpeft.load(tmp_path / "model", base=str(tiny_model))
    np.testing.assert_allclose(logits(back.model, back.transform, back.variables), expected, rtol=0, atol=1e-6)


def test_modules_share_the_base_of_a_loaded_model(tmp_path, tiny_model, monkeypatch):
    make(tmp_path / "first", tiny_model, "lora")
    expected, _ = make(tmp_path / "second", tiny_model, "plan", labels=("a", "b", "c"))
    first = jpeft.load(tmp_path / "first")
    monkeypatch.setattr(pretrained, "load", None)  # nothing is read again
    second = jpeft.load(tmp_path / "second", base=first)
    np.testing.assert_allclose(logits(second.model, second.transform, second.variables), expected, rtol=0, atol=1e-6)
    word = "embeddings/word_embeddings/embedding"
    assert tree.at(second.variables["params"], word) is tree.at(first.variables["params"], word)
    assert (second.labels, second.base, second.tokenizer) == (("a", "b", "c"), first.base, first.tokenizer)
    assert jpeft.predict(second, [("the dog", "a cat")]).shape == (1, 3)


def test_modules_of_another_base_do_not_share_it(tmp_path, tiny_model):
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(7))
    changed = tree.replace(loaded.params, "pooler/bias", lambda x: x + 1)
    pretrained.save(tmp_path / "other", loaded.config, changed, tokenizer_from=tiny_model)
    make(tmp_path / "first", tiny_model, "lora")
    for folder, base, kind in (("second", tmp_path / "other", "lora"), ("third", tiny_model, "full")):
        make(tmp_path / folder, base, kind)
        with pytest.raises(UserError, match="was trained on another base than the loaded model"):
            jpeft.load(tmp_path / folder, base=jpeft.load(tmp_path / "first"))


def test_a_name_that_no_folder_can_have_is_one_line():
    with pytest.raises(UserError, match="holds no trained modules"):
        jpeft.load("x" * 5000)


@pytest.mark.parametrize("missing", ["jpeft.json", "modules.safetensors"])
def test_a_folder_without_both_files_is_refused(tmp_path, tiny_model, missing):
    make(tmp_path, tiny_model, "lora")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=r"holds no trained modules: expected jpeft\.json and modules\.safetensors"):
        jpeft.load(tmp_path)


def test_saving_again_replaces(tmp_path, tiny_model):
    make(tmp_path, tiny_model, "prefix")
    expected, _ = make(tmp_path, tiny_model, "lora")
    back = jpeft.load(tmp_path)
    np.testing.assert_allclose(logits(back.model, back.transform, back.variables), expected, rtol=0, atol=1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["jpeft.json", "modules.safetensors"]
