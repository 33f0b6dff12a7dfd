"""Folders of AdapterHub's adapters: read to its own logits, and written as it would write them.

The goldens come from third_party/parity/make_adapters_goldens.py; third_party/parity/check_adapters_folders.py has
adapters itself open what is written.
"""

import json

import chex
import jax
import numpy as np
import pytest
from conftest import randomised
from parity import peers
from parity.peers import ARCHITECTURES, GOLDEN, golden, load_base
from safetensors.numpy import load_file, save_file
from test_fuzz import attempt

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.transform import FIXED, SHARED
from jpeft.plans.plan import Entry
from jpeft.plans.plan import spec as spec_of
from jpeft.store import adapterhub
from jpeft.store.adapterhub.format import bottleneck_size, reduction_factor
from jpeft.store.huggingface import Modules

METHODS = sorted(peers.methods("adapters", "bert"))
FLEXIBLE = {"classifier.dense": "heads.peer.1", "classifier.out_proj": "heads.peer.4", "classifier": "heads.peer.1"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return load_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_base(tmp_path_factory.mktemp("bert"), "bert")


def saved_by_adapters(folder, base, method):
    """A folder as save_adapter writes it, from the golden's tensors; of shared tensors there is one copy."""
    peer = golden("adapters", base.architecture, method)
    about = {"hidden_size": 16, "model_type": base.architecture, "version": "adapters.1.3.0", "model_name": ""}
    about["model_class"] = adapterhub.CLASSES[base.architecture]
    config = json.loads((GOLDEN / f"adapters_{base.architecture}.json").read_text())[method]
    folder.mkdir(exist_ok=True)
    head = {name: x for name, x in peer.trained.items() if name.startswith("classifier")}
    save_file({name: x for name, x in peer.trained.items() if name not in head}, folder / adapterhub.WEIGHTS)
    save_file(head, folder / adapterhub.HEAD_WEIGHTS)
    (folder / adapterhub.CONFIG).write_text(json.dumps({**about, "config": config, "name": "peer"}))
    (folder / adapterhub.HEAD_CONFIG).write_text(json.dumps({**about, "config": None, "name": None}))
    return peer


def logits(base, modules, inputs):
    """The gates average over padding, as those of the peer do: no mask is given to the modules."""
    variables = {"params": jpeft.union(base.params, modules.params), "peft": modules.leaves}
    return jpeft.apply(base.model, jpeft.build(modules.spec), variables, **inputs)[0]


def started(base, spec, scale=0.1):
    """Modules that have moved from where they start, and a head."""
    transform = jpeft.build(spec)
    leaves = jpeft.init(transform, jax.random.key(0), base.sites, base.params)
    trained, fixed = jpeft.core.partition.split(leaves)
    leaves = jpeft.union(fixed, jax.tree.map(lambda x, y: x + y, trained, randomised(trained, scale=scale)))
    return Modules(spec, leaves, {"classifier": randomised(base.params["classifier"])})


def entry(method, **options):
    return {"method": method, "options": options}


def configs_of(folder):
    whole = json.loads((folder / adapterhub.CONFIG).read_text())["config"]
    return whole["configs"] if whole.get("architecture") == "union" else [whole]


@pytest.mark.parametrize("method", METHODS)
def test_what_adapters_wrote_has_its_logits_here_and_goes_back_as_it_came(tmp_path, base, method):
    peer = saved_by_adapters(tmp_path / "theirs", base, method)
    modules = adapterhub.read(tmp_path / "theirs", base.model.config)
    np.testing.assert_allclose(logits(base, modules, peer.inputs), peer.logits, atol=2e-5)

    adapterhub.write(tmp_path / "ours", modules, base.model.config, "some/base", name="peer")
    for file in (adapterhub.WEIGHTS, adapterhub.HEAD_WEIGHTS):
        one, two = (load_file(tmp_path / name / file) for name in ("theirs", "ours"))
        assert set(one) == set(two)
        for name, x in one.items():
            np.testing.assert_array_equal(x, two[name], err_msg=name)
    for theirs, ours in zip(configs_of(tmp_path / "theirs"), configs_of(tmp_path / "ours"), strict=True):
        if theirs.get("flat"):  # the size of an MLP that is not there
            ours["bottleneck_size"] = theirs["bottleneck_size"]
        assert ours == theirs
    again = adapterhub.read(tmp_path / "ours", base.model.config)
    assert again.spec == modules.spec
    jax.tree.map(np.testing.assert_array_equal, again.leaves, modules.leaves)
    about = json.loads((tmp_path / "ours" / adapterhub.CONFIG).read_text())
    assert (about["model_name"], about["name"]) == ("some/base", "peer")


def plan(*layers):
    return spec_of({i: list(entries) for i, entries in enumerate(layers)})


PFEIFFER, LORA, PREFIX = Entry("pfeiffer", {"bottleneck": 5}), Entry("lora", {"rank": 2}), Entry("prefix", {})
SPECS = {
    "one layer": [entry("pfeiffer", layers=[1], bottleneck=3, activation="gelu", scale=2.0)],
    "both places": [entry("pfeiffer", targets="attention_add_norm|ffn_add_norm", learned_scale=True, ln_before=True)],
    "attention": [entry("houlsby", targets="attention_add_norm", gate=True, bottleneck=20)],
    "houlsby": [entry("houlsby", reduction_factor=3, ln_after=True, scale=0.5)],
    "parallel": [entry("parallel", bottleneck=7, gate=True, ln_before=True, ln_after=True)],
    "sizes by layer": plan([PFEIFFER], [Entry("pfeiffer", {"bottleneck": 3})]),
    "places by layer": [entry("pfeiffer", targets="layer_0/attention_add_norm|layer_1/ffn_add_norm")],
    "adapterdrop": [entry("adapterdrop", drop=1)],
    "adamix": [entry("adamix", bottleneck=4)],
    "sparse": [entry("sparse_adapter", kind="houlsby", density=0.3)],
    "lora": [entry("lora", rank=3, alpha=5.5, targets="key|query|intermediate|ffn/output", layers=[0])],
    "gated lora": [entry("lora", gate=True, targets="query|ffn/output")],
    "rslora": [entry("rslora", rank=3)],
    "pissa": [entry("pissa", rank=2, layers=[1])],
    "ia3": [entry("ia3", placement="before", layers=[1])],
    "ia3 elsewhere": [entry("ia3", targets="attention/query|intermediate")],
    "prefix": [entry("prefix", num_virtual_tokens=3, mlp_hidden=5, layers=[1], gate=True)],
    "flat prefix": [entry("prefix", num_virtual_tokens=3, mlp_hidden=None, gate=True)],
    "prompt": [entry("prompt", num_virtual_tokens=3, placement="states")],
    "unipelt": [entry("unipelt", num_virtual_tokens=2, mlp_hidden=4, reduction_factor=4, rank=2)],
    "unipelt of two": [entry("unipelt", variant="ap", num_virtual_tokens=2, mlp_hidden=4, layers=[0])],
    "mam": [entry("mam", num_virtual_tokens=2, mlp_hidden=4, bottleneck=4)],
    "plan": plan([PREFIX], [PFEIFFER]),
    "plan of two each": plan([PREFIX, LORA], [LORA, PFEIFFER]),
    "prompt and adapters": [entry("prompt", num_virtual_tokens=2, placement="states"), *plan([PFEIFFER], [LORA])],
}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_read_to_the_same_logits(tmp_path, bert, name):
    modules = started(bert, SPECS[name])
    adapterhub.write(tmp_path, modules, bert.model.config, "base", ["a", "b", "c"])
    again = adapterhub.read(tmp_path, bert.model.config)
    assert FIXED not in str(again.leaves)
    inputs = golden("adapters", "bert", "lora").inputs
    np.testing.assert_allclose(logits(bert, again, inputs), logits(bert, modules, inputs), atol=1e-5)
    head = json.loads((tmp_path / adapterhub.HEAD_CONFIG).read_text())
    assert (head["label2id"], head["num_labels"]) == ({"a": 0, "b": 1, "c": 2}, 3)
    # Written again, it is the same file.
    adapterhub.write(tmp_path / "again", again, bert.model.config, "base", ["a", "b", "c"])
    for file in (adapterhub.CONFIG, adapterhub.WEIGHTS):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_plan_is_a_union_whose_configs_leave_layers_out(tmp_path, bert):
    modules = started(bert, plan([PREFIX], [PFEIFFER]))
    assert SHARED in modules.leaves["prefix_0"]
    folded = modules._replace(leaves=jpeft.fold(jpeft.build(modules.spec), modules.leaves))
    for given, flat in ((modules, False), (folded, True)):
        out = tmp_path / str(flat)
        adapterhub.write(out, given, bert.model.config, "base")
        adapter, prefix = configs_of(out)
        assert (prefix["architecture"], prefix["leave_out"], prefix["flat"]) == ("prefix_tuning", [1], flat)
        assert (adapter["leave_out"], adapter["original_ln_before"]) == ([0], True)
        names = set(load_file(out / adapterhub.WEIGHTS))
        assert any(name.startswith("bert.encoder.layer.1.output.adapters.jpeft.") for name in names)
        inputs = golden("adapters", "bert", "lora").inputs
        again = adapterhub.read(out, bert.model.config)
        np.testing.assert_allclose(logits(bert, again, inputs), logits(bert, modules, inputs), atol=1e-5)
        assert [x["options"]["layers"] for x in again.spec] == [[1], [0]]


def test_folded_prefixes_of_several_entries_are_one(tmp_path, bert):
    """Flat rows are those of the layers in turn, of which entry they ever came."""
    one = Entry("prefix", {"num_virtual_tokens": 2, "mlp_hidden": 4})
    two = Entry("prefix", {"num_virtual_tokens": 2, "mlp_hidden": 3})
    modules = started(bert, plan([one], [two]))
    with pytest.raises(UserError, match="one prefix, of one length and with one MLP"):
        adapterhub.write(tmp_path, modules, bert.model.config, "base")
    folded = modules._replace(leaves=jpeft.fold(jpeft.build(modules.spec), modules.leaves))
    adapterhub.write(tmp_path, folded, bert.model.config, "base")
    again = adapterhub.read(tmp_path, bert.model.config)
    assert len(again.spec) == 1
    inputs = golden("adapters", "bert", "lora").inputs
    np.testing.assert_allclose(logits(bert, again, inputs), logits(bert, modules, inputs), atol=1e-5)


@pytest.mark.parametrize("d", [16, 768])
def test_every_bottleneck_has_a_reduction_factor(d):
    for size in range(1, d + 9):
        factor = json.loads(json.dumps(reduction_factor(d, size)))
        assert max(1, int(d // factor)) == size
        assert bottleneck_size(factor, d) == size
    assert bottleneck_size(2 * d, d) == 1  # never none


def test_reduction_factors_by_layer_are_several_instances(tmp_path, bert):
    saved_by_adapters(tmp_path, bert, "seq_bn")
    tensors = load_file(tmp_path / adapterhub.WEIGHTS)
    for name, x in tensors.items():
        if "layer.1." in name and "adapter_down" in name:
            tensors[name] = np.ascontiguousarray(x[:2])
        if "layer.1." in name and name.endswith("adapter_up.weight"):
            tensors[name] = np.ascontiguousarray(x[:, :2])
    save_file(tensors, tmp_path / adapterhub.WEIGHTS)
    _edit(tmp_path / adapterhub.CONFIG, reduction_factor={"1": 8, "default": 4})
    modules = adapterhub.read(tmp_path, bert.model.config)
    assert [(x["options"]["bottleneck"], x["options"]["layers"]) for x in modules.spec] == [(4, [0]), (2, [1])]
    _edit(tmp_path / adapterhub.CONFIG, reduction_factor={"1": 8})
    with pytest.raises(UserError, match="reduction_factor must be a positive number, got None"):
        adapterhub.read(tmp_path, bert.model.config)


def test_tensors_that_are_there_for_every_layer_and_without_the_name_of_the_model(tmp_path, bert):
    """A prefix as in the state of a model without a head: the same tensors under the model and every layer."""
    peer = saved_by_adapters(tmp_path, bert, "prefix_tuning")
    tensors = load_file(tmp_path / adapterhub.WEIGHTS)
    stem = "bert.encoder.layer.0.attention.self.prefix_tuning.pool."
    copies = {
        name.replace(stem, other): x
        for name, x in tensors.items()
        for other in ("prefix_tuning.", *(stem.replace("0", i).removeprefix("bert.") for i in "01"))
    }
    save_file(copies, tmp_path / adapterhub.WEIGHTS)
    found = logits(bert, adapterhub.read(tmp_path, bert.model.config), peer.inputs)
    np.testing.assert_allclose(found, peer.logits, atol=2e-5)
    name = next(name for name in copies if name.endswith("control_trans.0.bias"))
    save_file({**copies, name: copies[name] + 1}, tmp_path / adapterhub.WEIGHTS)
    with pytest.raises(UserError, match=r"several control_trans\.0\.bias of one prefix, which differ"):
        adapterhub.read(tmp_path, bert.model.config)


def test_a_norm_before_the_bottleneck_has_two_names_there(tmp_path, bert):
    peer = saved_by_adapters(tmp_path, bert, "seq_bn_norms")
    tensors = load_file(tmp_path / adapterhub.WEIGHTS)
    names = {name: name.replace("adapter_norm_before", "adapter_down.0") for name in tensors if "norm_before" in name}
    assert len(names) == 4
    both = tensors | {other: tensors[name] for name, other in names.items()}
    save_file(both, tmp_path / adapterhub.WEIGHTS)
    found = logits(bert, adapterhub.read(tmp_path, bert.model.config), peer.inputs)
    np.testing.assert_allclose(found, peer.logits, atol=2e-5)
    name = next(iter(names.values()))
    save_file({**both, name: both[name] + 1}, tmp_path / adapterhub.WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_down\.0.* differs from .*, whose second name it is"):
        adapterhub.read(tmp_path, bert.model.config)


def test_flexible_heads(tmp_path, base):
    """Those of AutoAdapterModel, where they compute what ours does."""
    peer = saved_by_adapters(tmp_path, base, "seq_bn")
    head = load_file(tmp_path / adapterhub.HEAD_WEIGHTS)
    renamed = {f"{FLEXIBLE[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": x for name, x in head.items()}
    save_file(renamed, tmp_path / adapterhub.HEAD_WEIGHTS)
    layers = len(head) // 2
    about = json.loads((tmp_path / adapterhub.HEAD_CONFIG).read_text()) | {"model_class": "SomeAdapterModel"}
    config = {"head_type": "classification", "layers": layers, "use_pooler": layers == 1, "activation_function": "tanh"}
    (tmp_path / adapterhub.HEAD_CONFIG).write_text(json.dumps({**about, "name": "peer", "config": config}))
    found = logits(base, adapterhub.read(tmp_path, base.model.config), peer.inputs)
    np.testing.assert_allclose(found, peer.logits, atol=2e-5)
    _edit(tmp_path / adapterhub.HEAD_CONFIG, layers=3)
    with pytest.raises(UserError, match=f"layers 3 has no counterpart, only {layers}"):
        adapterhub.read(tmp_path, base.model.config)


def test_folders_without_a_head(tmp_path, bert):
    peer = saved_by_adapters(tmp_path, bert, "seq_bn")
    for name in (adapterhub.HEAD_CONFIG, adapterhub.HEAD_WEIGHTS):
        (tmp_path / name).unlink()
    modules = adapterhub.read(tmp_path, bert.model.config)
    assert modules.params == {}
    adapterhub.write(tmp_path / "out", modules, bert.model.config, "base")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {adapterhub.CONFIG, adapterhub.WEIGHTS}
    head = {"kernel": peer.trained["classifier.weight"].T, "bias": peer.trained["classifier.bias"]}
    found = logits(bert, modules._replace(params={"classifier": head}), peer.inputs)
    np.testing.assert_allclose(found, peer.logits, atol=2e-5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([], "a head without modules: .* --format hf"),
        ([entry("dora")], "adapters has no dora that computes the same: .* --format stablehlo"),
        ([entry("p_tuning")], "adapters has no p_tuning"),
        ([entry("prompt")], "a prompt after the embeddings, placement='states' here: .* --format stablehlo"),
        ([entry("ia3")], "at encoder/layer_0/ffn/output scales its layer's input, .* --format hf"),
        ([entry("lora", targets="attention/output")], "no lora at encoder/layer_0/attention/output: .* --format hf"),
        ([entry("parallel", targets="attention/output")], "no parallel at encoder/layer_0/attention/output"),
        ([entry("lora", rank_pattern={"query": 2})], "LoRA in one size per layer, and layer 0 has several"),
        ([entry("pfeiffer"), entry("parallel")], "room for one output_adapter in a layer, and layer 0 has two"),
        ([entry("lora"), entry("ia3", placement="before")], "one selfattn_lora in a layer, and layer 0 has two"),
        ([entry("lora"), entry("lora", rank=2, targets="ffn/output")], "room for one LoRA or"),
        ([entry("lora", rank_pattern={"layer_0/.*": 2})], "room for one LoRA or .*, of one size"),
        (plan([Entry("ia3", {"placement": "before"})], [LORA]), "room for one LoRA or"),
        ([entry("prompt", placement="states")] * 2, "one prompt_tuning in a layer, and there are two"),
        (
            [entry("prefix", mlp_hidden=4, shift_positions=True)],
            "adapters counts positions from 0, a prefix with shift_positions does not: export --format peft",
        ),
        (
            [entry("prefix", mlp_hidden=4, layers=[0]), entry("prefix", mlp_hidden=5, layers=[1])],
            "one prefix, of one length",
        ),
    ],
)
def test_what_adapters_has_no_words_for(tmp_path, bert, spec, says):
    leaves = jpeft.init(jpeft.build(spec), jax.random.key(0), bert.sites, bert.params)
    with pytest.raises(UserError, match=says) as caught:
        adapterhub.write(tmp_path, Modules(spec, leaves, {}), bert.model.config, "base")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_pooler_that_trained_is_the_first_layer_of_a_flexible_head(tmp_path, bert):
    trained = {name: randomised(bert.params[name]) for name in ("pooler", "classifier")}
    modules = started(bert, [entry("pfeiffer")])._replace(params=trained)
    adapterhub.write(tmp_path, modules, bert.model.config, "base", name="mine")
    about = json.loads((tmp_path / adapterhub.HEAD_CONFIG).read_text())
    assert (about["model_class"], about["name"]) == ("BertAdapterModel", "mine")
    assert {name: about["config"][name] for name in ("layers", "use_pooler")} == {"layers": 2, "use_pooler": False}
    tensors = load_file(tmp_path / adapterhub.HEAD_WEIGHTS)
    np.testing.assert_array_equal(tensors["heads.mine.1.weight"], trained["pooler"]["kernel"].T)
    np.testing.assert_array_equal(tensors["heads.mine.4.bias"], trained["classifier"]["bias"])
    chex.assert_trees_all_equal(adapterhub.read(tmp_path, bert.model.config).params, trained)


def test_what_trained_besides_the_head(tmp_path, bert):
    params = {"classifier": bert.params["classifier"], "embeddings": bert.params["embeddings"]}
    modules = started(bert, [entry("pfeiffer")])._replace(params=params)
    with pytest.raises(UserError, match=r"cannot hold embeddings/[\w/]+, which trained as well"):
        adapterhub.write(tmp_path, modules, bert.model.config, "base")


def _edit(path, top=False, **changes):
    about = json.loads(path.read_text())
    (about if top else about["config"]).update(changes)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("seq_bn", {"architecture": "reft"}, "architecture 'reft' is not supported"),
        ("seq_bn", {"architecture": ["lora"]}, "is not supported"),
        ("seq_bn", {"architecture": "union"}, "a union has a list of configs, got None"),
        ("seq_bn", {"mystery": 3}, "'mystery' 3 has no counterpart here"),
        ("seq_bn", {"phm_layer": True}, "phm_layer True has no counterpart here, only False"),
        ("seq_bn", {"inv_adapter": "nice"}, "inv_adapter 'nice' has no counterpart"),
        ("seq_bn", {"residual_before_ln": False}, "residual_before_ln False has no counterpart"),
        ("seq_bn", {"original_ln_after": False}, "original_ln_after False has no counterpart"),
        ("seq_bn", {"scaling": "channel"}, "scaling must be a positive number, got 'channel'"),
        ("seq_bn", {"non_linearity": "leakyrelu"}, "non_linearity 'leakyrelu' is unknown"),
        ("seq_bn", {"output_adapter": False}, "mh_adapter and output_adapter are both off"),
        ("seq_bn", {"ln_before": "yes"}, "ln_before must be true or false, got 'yes'"),
        ("seq_bn", {"ln_before": True}, r"lacks .bert\.encoder\.layer\.0\.output\.adapters\.peer\.adapter_down\.1"),
        ("seq_bn", {"leave_out": [1]}, r"holds .bert\.encoder\.layer\.1\..* which jpeft cannot place"),
        ("seq_bn", {"leave_out": [0, 1]}, "leave_out names every layer"),
        ("seq_bn", {"leave_out": ["0"]}, "leave_out must be a list of layers"),
        ("seq_bn", {"reduction_factor": 8}, r"has shape \[4, 16\] instead of \[2, 16\]"),
        ("seq_bn", {"reduction_factor": 1e-300}, "gives no bottleneck at hidden size 16"),
        ("seq_bn_norms", {"adapter_residual_before_ln": True}, "adapter_residual_before_ln True has no counterpart"),
        ("par_bn", {"mh_adapter": True}, "mh_adapter True has no counterpart"),
        ("lora", {"use_dora": True}, "use_dora True has no counterpart"),
        ("lora", {"vera_d": 0.1}, "vera_d 0.1 has no counterpart"),
        ("lora", {"alpha": None}, "alpha must be a positive number, got None"),
        ("lora", {"alpha": 10**400}, "alpha must be a finite number"),
        ("lora", {"r": 10**9}, "r must be an integer from 1 to"),
        ("lora", {"attn_matrices": ["o"]}, "attn_matrices must be a list of 'q', 'k' and 'v'"),
        ("lora", {"composition_mode": "new"}, "composition_mode 'new' has no counterpart"),
        ("ia3", {"alpha": 2}, "alpha 2 has no counterpart here, only 1"),
        ("prefix_tuning", {"non_linearity": "relu"}, "non_linearity 'relu' has no counterpart"),
        ("prefix_tuning", {"use_gating": True, "shared_gating": False}, "shared_gating False has no counterpart"),
        ("prefix_tuning", {"flat": True}, "lacks the prefix's control_trans"),
        ("prefix_tuning", {"leave_out": [1]}, r"control_trans\.2\.weight' has shape \[64, 6\] instead of \[32, 6\]"),
        ("prompt_tuning", {"combine": "prefix_after_bos"}, "combine 'prefix_after_bos' has no counterpart"),
        ("prompt_tuning", {"prompt_length": True}, "prompt_length must be an integer"),
        ("unipelt", {"configs": [{"architecture": "union"}]}, "architecture 'union' is not supported"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_read(tmp_path, bert, method, change, says):
    saved_by_adapters(tmp_path, bert, method)
    _edit(tmp_path / adapterhub.CONFIG, **change)
    with pytest.raises(UserError, match=says):
        adapterhub.read(tmp_path, bert.model.config)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (adapterhub.CONFIG, {"version": "4.1.0"}, "does not say that adapters wrote it"),
        (adapterhub.CONFIG, {"model_type": "roberta"}, "is of another model: model_type 'roberta'"),
        (adapterhub.CONFIG, {"hidden_size": 768}, "is of another model: hidden_size 768 instead of 16"),
        (adapterhub.CONFIG, {"name": None}, "lacks a name or a config"),
        (adapterhub.CONFIG, {"config": "seq_bn"}, "lacks a name or a config"),
        (adapterhub.CONFIG, {"name": "two\nlines"}, r"lacks .bert\.encoder.*adapters\.two\\nlines\."),
        (adapterhub.CONFIG, {"name": "other"}, r"lacks .bert\.encoder\.layer\.0\.output\.adapters\.other\."),
        (adapterhub.HEAD_CONFIG, {"model_class": "BertForTokenClassification"}, "is not of BertForSequence"),
        (adapterhub.HEAD_CONFIG, {"version": None}, "does not say that adapters wrote it"),
    ],
)
def test_descriptions_that_cannot_be_read(tmp_path, bert, file, change, says):
    saved_by_adapters(tmp_path, bert, "seq_bn")
    _edit(tmp_path / file, top=True, **change)
    with pytest.raises(UserError, match=says):
        adapterhub.read(tmp_path, bert.model.config)


def test_lora_of_versions_that_ignored_alpha(tmp_path, bert):
    """Before 1.1 nothing was scaled by alpha / r, and `adapters` now reads alpha as r."""
    saved_by_adapters(tmp_path, bert, "lora")
    _edit(tmp_path / adapterhub.CONFIG, top=True, version="adapters.1.0.1")
    assert adapterhub.read(tmp_path, bert.model.config).spec[0]["options"]["alpha"] == 3


def test_folders_that_cannot_be_read(tmp_path, bert):
    saved_by_adapters(tmp_path, bert, "lora")
    weights, head = tmp_path / adapterhub.WEIGHTS, tmp_path / adapterhub.HEAD_WEIGHTS
    whole, tensors, of_head = weights.read_bytes(), load_file(weights), load_file(head)
    name = next(iter(tensors))

    def refused(says):
        with pytest.raises(UserError, match=says):
            adapterhub.read(tmp_path, bert.model.config)

    save_file({**of_head, "classifier.bias": np.ones(7, np.float32)}, head)
    refused(r"classifier\.bias' has shape \[7\] instead of \[3\]")
    save_file({**of_head, "other": np.ones(7, np.float32)}, head)
    refused("holds 'other', which jpeft cannot place")
    head.unlink()
    refused("there is no file .*model_head")
    (tmp_path / "pytorch_model_head.bin").write_bytes(b"")
    refused("is a pickle, which could run code and is never loaded")
    weights.write_bytes(whole[:-7])
    refused("is not a safetensors file")
    save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, weights)
    refused("is not finite, or not of floats")
    save_file({**tensors, name: np.ones(tensors[name].shape, np.int32)}, weights)
    refused("is not finite, or not of floats")
    save_file({**tensors, "bert.extra.weight": np.ones(2, np.float32)}, weights)
    refused(r"holds .bert\.extra\.weight', which jpeft cannot place")
    save_file({key: x for key, x in tensors.items() if key != name}, weights)
    refused("lacks .bert")
    weights.unlink()
    refused("there is no file")
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    refused("is a pickle, which could run code")


@pytest.mark.parametrize("method", ["seq_bn_norms", "lora", "unipelt", "prefix_tuning_flat", "prompt_tuning"])
def test_damaged_folders_are_read_or_refused_in_one_line(tmp_path, bert, method):
    saved_by_adapters(tmp_path, bert, method)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for seed in range(60):
            attempt(lambda: adapterhub.read(tmp_path, bert.model.config), path, whole, seed)
    adapterhub.read(tmp_path, bert.model.config)
