"""Folders of Hugging Face peft: read to its own logits, and written as it would write them.

The goldens come from third_party/parity/make_peft_goldens.py; third_party/parity/check_peft_folders.py has peft itself
open what is written.
"""

import json
import re

import jax
import numpy as np
import pytest
from conftest import randomised
from parity.peers import ARCHITECTURES, GOLDEN, golden, load_base
from safetensors.numpy import load_file, save_file
from test_fuzz import attempt

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.transform import FIXED
from jpeft.store import huggingface
from jpeft.store.huggingface import Modules
from jpeft.store.huggingface.format import BODY

METHODS = ["lora", "rslora", "dora", "ia3", "ia3_inner", "prompt", "p_tuning_mlp", "prefix", "prefix_flat"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return load_base(tmp_path_factory.mktemp(request.param), request.param)


def saved_by_peft(folder, base, method):
    """A folder as peft's save_pretrained writes it, from the golden's tensors."""
    peer = golden("peft", base.architecture, method)
    stored = {name.replace(".modules_to_save", "").replace(".default", ""): x for name, x in peer.trained.items()}
    stored = {name.replace("magnitude_vector.weight", "magnitude_vector"): x for name, x in stored.items()}
    if method.startswith("p"):  # the encoder of the prompt is not saved, but what it gives
        rows = peer.trained["prompt_encoder.default.embedding.weight"]
        stored = {name: x for name, x in stored.items() if "classifier" in name}
        made = {"p_tuning_mlp": encoded, "prefix": projected}.get(method, lambda tensors, rows: rows)
        stored["prompt_embeddings"] = made(peer.trained, rows)
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in stored.items()}, folder / huggingface.WEIGHTS)
    config = json.loads((GOLDEN / f"peft_{base.architecture}.json").read_text())[method]
    (folder / huggingface.CONFIG).write_text(json.dumps(config))
    return peer


def encoded(tensors, rows):
    for i in (0, 2, 4):
        name = f"prompt_encoder.default.mlp_head.{i}"
        rows = rows @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        rows = rows if i == 4 else np.maximum(rows, 0)
    return rows


def projected(tensors, rows):
    name = "prompt_encoder.default.transform"
    rows = np.tanh(rows @ tensors[f"{name}.0.weight"].T + tensors[f"{name}.0.bias"])
    return rows @ tensors[f"{name}.2.weight"].T + tensors[f"{name}.2.bias"]


def logits(base, modules, inputs):
    params = jpeft.union(base.params, modules.params)
    variables = {"params": params, "peft": modules.leaves}
    return jpeft.apply(base.model, jpeft.build(modules.spec), variables, **inputs)[0]


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_wrote_has_its_logits_here_and_goes_back_as_it_came(tmp_path, base, method):
    peer = saved_by_peft(tmp_path / "peft", base, method)
    modules = huggingface.read(tmp_path / "peft", base.model.config)
    np.testing.assert_allclose(logits(base, modules, peer.inputs), peer.logits, atol=2e-5)

    huggingface.write(tmp_path / "ours", modules, base.model.config, "some/base")
    one, two = (load_file(tmp_path / name / huggingface.WEIGHTS) for name in ("peft", "ours"))
    assert set(one) == set(two)
    for name, x in one.items():
        np.testing.assert_array_equal(x, two[name], err_msg=name)
    theirs, ours = (json.loads((tmp_path / name / huggingface.CONFIG).read_text()) for name in ("peft", "ours"))
    fields = ("r", "lora_alpha", "use_rslora", "use_dora", "task_type", "num_virtual_tokens", "token_dim", "num_layers")
    for field in fields:
        assert theirs.get(field) == ours.get(field), field
    assert ours["base_model_name_or_path"] == "some/base"
    again = huggingface.read(tmp_path / "ours", base.model.config)
    assert again.spec == modules.spec
    jax.tree.map(np.testing.assert_array_equal, again.leaves, modules.leaves)


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "lora", "options": {"rank": 2, "rank_pattern": {".*0.*query": 5}, "alpha_pattern": {"value": 3}}},
        {"method": "pissa", "options": {"rank": 2, "targets": "query|ffn/output"}},
        {"method": "dora", "options": {"rank": 3, "layers": [1]}},
        {"method": "prefix", "options": {"num_virtual_tokens": 3, "mlp_hidden": 5, "shift_positions": True}},
        {"method": "prefix", "options": {"num_virtual_tokens": 3, "mlp_hidden": None, "shift_positions": True}},
    ],
    ids=["patterns", "pissa", "layers", "prefix", "flat prefix"],
)  # fmt: skip
def test_what_is_written_is_read_to_the_same_logits(tmp_path, base, entry):
    """With sizes that differ by site, in some layers only; PiSSA as a LoRA of twice the rank, prefixes folded."""
    method = jpeft.build([entry])
    ((name, leaves),) = jpeft.init(method, jax.random.key(0), base.sites, base.params).items()
    trained, fixed = jpeft.core.partition.split(leaves)
    trained = jax.tree.map(lambda x, y: x + y, trained, randomised(trained, scale=0.1))
    leaves = jpeft.union(fixed, trained)
    head = randomised(base.params["classifier"])
    modules = Modules([entry], jpeft.fold(method, {name: leaves}), {"classifier": head})
    huggingface.write(tmp_path, modules, base.model.config, "base")
    again = huggingface.read(tmp_path, base.model.config)
    assert FIXED not in str(again.leaves)
    inputs = golden("peft", base.architecture, "lora").inputs
    np.testing.assert_allclose(logits(base, again, inputs), logits(base, modules, inputs), atol=1e-5)


def entry_of(method, **options):
    return {"method": method, "options": options}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([entry_of("lora"), entry_of("pfeiffer")], "peft cannot hold lora and pfeiffer in one adapter: .*merged"),
        ([], "peft cannot hold no modules"),
        ([entry_of("pfeiffer")], "peft has no pfeiffer that computes the same"),
        ([entry_of("prefix", mlp_hidden=None)], "no such prefix: it counts .* trained with shift_positions=True$"),
        ([entry_of("prefix", mlp_hidden=None, shift_positions=True, layers=[1])], "keys and values into every layer"),
        ([entry_of("prefix", mlp_hidden=None, shift_positions=True, gate=True)], "into every layer, without gates"),
        ([entry_of("lora", gate=True)], "peft has no gated LoRA"),
        ([entry_of("prompt", placement="states")], "no such prompt: it puts virtual tokens before the words only"),
    ],
)
def test_what_peft_has_no_words_for(tmp_path, base, spec, says):
    leaves = jpeft.init(jpeft.build(spec), jax.random.key(0), base.sites, base.params)
    with pytest.raises(UserError, match=says):
        huggingface.write(tmp_path, Modules(spec, leaves, {}), base.model.config, "base")


def test_modules_in_the_head_which_peft_stores_whole(tmp_path, base):
    place = {"bert": "classifier", "roberta": "classifier/dense"}[base.architecture]
    spec = [entry_of("lora", targets=f"query|{place}")]
    leaves = jpeft.init(jpeft.build(spec), jax.random.key(0), base.sites, base.params)
    with pytest.raises(UserError, match="peft cannot hold lora in the classifier, which it stores whole: export the"):
        huggingface.write(tmp_path, Modules(spec, leaves, {}), base.model.config, "base")


def test_what_trained_besides_the_head_and_the_pooler(tmp_path, base):
    modules = huggingface.read(_folder(tmp_path, base), base.model.config)
    params = {"embeddings": {"LayerNorm": {"scale": np.ones(16, np.float32)}}}
    with pytest.raises(UserError, match="cannot hold embeddings/LayerNorm/scale"):
        huggingface.write(tmp_path / "x", modules._replace(params=params), base.model.config, "base")


def _folder(tmp_path, base, method="lora"):
    saved_by_peft(tmp_path / "peft", base, method)
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": ["LORA"]}, "is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base weights"),
        ({"peft_type": "x" * 999}, "peft_type 'x{59} is not supported"),
        ({"bias": "all"}, "bias 'all' .* no counterpart"),
        ({"bias": "x" * 999}, "bias 'x{59} and .* no counterpart"),
        ({"init_lora_weights": "pissa_" + "x" * 999}, "init_lora_weights 'pissa_x{53} has changed"),
        ({"use_qalora": True}, "use_qalora has no counterpart"),
        ({"use_dora": True}, "lacks a tensor of its dora"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(?\n)": 2}}, r"alpha_pattern is not \{pattern: number\}: 'unknown extension [^\n]*$"),
        ({"alpha_pattern": {"a{99999999999}": 2}}, "alpha_pattern is not .*too large"),
        ({"alpha_pattern": {"(" * 9999 + ")" * 9999: 2}}, "alpha_pattern is not .*recursion"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"r": 8}, "attention/query has rank 3, adapter_config.json says 8"),
        ({"r": "x"}, "r and rank_pattern must be positive numbers, got 'x'"),
        ({"rank_pattern": {"query": 8}}, "attention/query has rank 3, adapter_config.json says 8"),
        ({"target_modules": ["key"]}, "attention/query, which is not among the targets of adapter_config.json"),
        ({"target_modules": "("}, "target_modules or layers_to_transform is not as peft writes it"),
        ({"layers_to_transform": [0]}, "layer_1/attention/query, which is not among the targets"),
        ({"layer_replication": [[0, 1]]}, "layer_replication has no counterpart here"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga' has changed the base weights"),
        ({"lora_alpha": 10**400}, "must be positive numbers, got 10{59}$"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, base, change, says):
    folder = _folder(tmp_path, base)
    config = json.loads((folder / huggingface.CONFIG).read_text()) | change
    (folder / huggingface.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        huggingface.read(folder, base.model.config)


@pytest.mark.parametrize("start", ["", "^"])
def test_targets_and_patterns_that_name_a_module_in_full(tmp_path, base, start):
    folder = _folder(tmp_path, base)
    config = json.loads((folder / huggingface.CONFIG).read_text())
    stored = load_file(folder / huggingface.WEIGHTS)
    names = sorted({name.removeprefix(BODY).split(".lora_")[0] for name in stored if ".lora_" in name})
    query = f"{base.architecture}.encoder.layer.1.attention.self.query"
    assert query in names
    config |= {"target_modules": names, "alpha_pattern": {start + query: 32}}
    (folder / huggingface.CONFIG).write_text(json.dumps(config))
    (entry,) = huggingface.read(folder, base.model.config).spec
    assert entry["options"]["alpha_pattern"] == {"encoder/layer_1/attention/query": 32.0}
    (folder / huggingface.CONFIG).write_text(json.dumps(config | {"target_modules": "|".join(map(re.escape, names))}))
    huggingface.read(folder, base.model.config)


def test_folders_that_cannot_be_read(tmp_path, base):
    folder, config = _folder(tmp_path, base), base.model.config
    whole = (folder / huggingface.WEIGHTS).read_bytes()
    tensors = load_file(folder / huggingface.WEIGHTS)

    def refused(says):
        with pytest.raises(UserError, match=says):
            huggingface.read(folder, config)

    (folder / huggingface.WEIGHTS).write_bytes(whole[:-7])
    refused("is not a safetensors file")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, folder / huggingface.WEIGHTS)
    refused("is not finite")
    save_file({**tensors, "extra.weight": np.ones(2, np.float32)}, folder / huggingface.WEIGHTS)
    refused(r"holds 'extra\.weight', which jpeft cannot place")
    save_file({**tensors, "two\nlines": np.ones(2, np.float32)}, folder / huggingface.WEIGHTS)
    refused(r"holds 'two\\nlines', which jpeft cannot place$")
    save_file({**tensors, "two\nlines": np.full(2, np.nan, np.float32)}, folder / huggingface.WEIGHTS)
    refused(r"'two\\nlines' is not finite, or not of floats$")
    for kind in (np.complex64, np.int32):
        save_file({**tensors, name: np.ones(tensors[name].shape, kind)}, folder / huggingface.WEIGHTS)
        refused("lora_A.weight' is not finite, or not of floats$")
    save_file({**tensors, name: np.ones((3, 5), np.float32)}, folder / huggingface.WEIGHTS)
    refused("has shapes")
    (folder / huggingface.WEIGHTS).unlink()
    refused("there is no file")


@pytest.mark.parametrize(
    ("end", "shape", "says"),
    [
        ("layer.0.attention.self.value.ia3_l", (), r"layer_0/attention/value has shape \[\] instead of \[16, 1\]"),
        ("layer.1.attention.self.key.ia3_l", (9, 1), r"layer_1/attention/key has shape \[9, 1\] instead of \[16, 1\]"),
        ("layer.1.attention.self.key.ia3_l", (16,), r"layer_1/attention/key has shape \[16\] instead of \[16, 1\]"),
        (
            "layer.1.attention.self.key.ia3_l",
            (1, 16),
            "layer_1/attention/key scales the layer's input, where jpeft scales its output",
        ),
        ("layer.0.output.dense.ia3_l", (1, 9), r"layer_0/ffn/output has shape \[1, 9\] instead of \[1, {wide}\]"),
        (
            "layer.0.output.dense.ia3_l",
            (16, 1),
            "layer_0/ffn/output scales the layer's output, where jpeft scales its input",
        ),
    ],
)
def test_vectors_of_ia3_that_do_not_fit(tmp_path, base, end, shape, says):
    folder, config = _folder(tmp_path, base, "ia3"), base.model.config
    tensors = load_file(folder / huggingface.WEIGHTS)
    (name,) = (name for name in tensors if name.endswith(end))
    save_file({**tensors, name: np.ones(shape, np.float32)}, folder / huggingface.WEIGHTS)
    with pytest.raises(UserError, match=says.replace("{wide}", str(config.intermediate_size))):
        huggingface.read(folder, config)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_heads_that_do_not_fit(tmp_path, base, method):
    folder, config = _folder(tmp_path, base, method), base.model.config
    tensors = load_file(folder / huggingface.WEIGHTS)
    for name in (name for name in tensors if "classifier" in name):
        for shape in ((9, 4), (), (*tensors[name].shape, 1)):
            save_file({**tensors, name: np.ones(shape, np.float32)}, folder / huggingface.WEIGHTS)
            with pytest.raises(UserError) as error:
                huggingface.read(folder, config)
            says = f"{name} has shape {list(shape)} instead of {list(tensors[name].shape)}"
            assert str(error.value) == f"{huggingface.WEIGHTS}: {says}"


def test_a_pooler_is_that_of_the_model(tmp_path, base):
    folder, config = _folder(tmp_path, base), base.model.config
    tensors = load_file(folder / huggingface.WEIGHTS)
    name = f"{BODY}{config.model_type}.pooler.dense.weight"
    whole = {name: np.ones((16, 16), np.float32), name.replace("weight", "bias"): np.ones(16, np.float32)}
    save_file({**tensors, **whole}, folder / huggingface.WEIGHTS)
    if config.model_type == "bert":
        assert huggingface.read(folder, config).params["pooler"]["kernel"].shape == (16, 16)
        save_file({**tensors, name: whole[name]}, folder / huggingface.WEIGHTS)
        with pytest.raises(UserError, match="has the kernel of pooler alone"):
            huggingface.read(folder, config)
        save_file({**tensors, name: np.ones((16, 9), np.float32)}, folder / huggingface.WEIGHTS)
    with pytest.raises(UserError, match=r"pooler\.dense\.weight(' *, which jpeft cannot| has shape \[16, 9\] instead)"):
        huggingface.read(folder, config)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("layer.1.attention.self.value.lora", "has no tensors of encoder/layer_1/attention/value, which is among"),
        ("classifier", "lacks the classifier, which adapter_config.json names among modules_to_save"),
    ],
)
def test_lost_tensors_are_missed(tmp_path, base, lost, says):
    folder = _folder(tmp_path, base)
    tensors = load_file(folder / huggingface.WEIGHTS)
    about = json.loads((folder / huggingface.CONFIG).read_text()) | {"modules_to_save": ["classifier"]}
    (folder / huggingface.CONFIG).write_text(json.dumps(about))
    save_file({name: x for name, x in tensors.items() if lost not in name}, folder / huggingface.WEIGHTS)
    with pytest.raises(UserError, match=says):
        huggingface.read(str(folder), base.model.config)


def test_halves_are_read_as_float32(tmp_path, base):
    folder = _folder(tmp_path, base)
    tensors = load_file(folder / huggingface.WEIGHTS)
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, folder / huggingface.WEIGHTS)
    modules = huggingface.read(folder, base.model.config)
    assert {x.dtype for x in jax.tree.leaves([modules.leaves, modules.params])} == {np.dtype("float32")}


@pytest.mark.parametrize("shape", [(), (4,), (0, 64), (4, 63), (4, 16)])
def test_prefixes_that_do_not_fit(tmp_path, base, shape):
    folder = _folder(tmp_path, base, "prefix_flat")
    tensors = load_file(folder / huggingface.WEIGHTS)
    save_file({**tensors, "prompt_embeddings": np.ones(shape, np.float32)}, folder / huggingface.WEIGHTS)
    with pytest.raises(UserError, match="no prompt_embeddings of width 64, keys and values of 2 layers"):
        huggingface.read(folder, base.model.config)


@pytest.mark.parametrize("method", ["rslora", "dora", "ia3", "prompt", "prefix_flat"])
def test_damaged_folders_are_read_or_refused_in_one_line(tmp_path, base, method):
    folder = _folder(tmp_path, base, method)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for seed in range(60):
            attempt(lambda: huggingface.read(folder, base.model.config), path, whole, seed)
    huggingface.read(folder, base.model.config)
