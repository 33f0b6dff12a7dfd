import json
import random

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import randomised

import jpeft
from jpeft import Entry, UserError
from jpeft.core import tree
from jpeft.core.partition import rates
from jpeft.models import Bert, BertConfig
from jpeft.plans import plan
from jpeft.plans import plan as plans

LORA, ADAPTER = Entry("lora", {"rank": 2}), Entry("pfeiffer", {"bottleneck": 3})


def test_the_order_of_every_layer_is_kept():
    spec = plan.spec({0: [LORA, ADAPTER], 1: [ADAPTER, LORA], 2: [ADAPTER], 3: [LORA, LORA]})
    groups = [(group["method"], group["options"]["layers"]) for group in spec]
    assert groups == [("lora", [0, 3]), ("pfeiffer", [0, 1, 2]), ("lora", [1, 3])]


def test_random_plans_keep_order_and_membership():
    rng = random.Random(0)
    entries = [LORA, ADAPTER, Entry("prefix"), Entry("houlsby")]
    for _ in range(200):
        made = {layer: rng.choices(entries, k=rng.randint(0, 4)) for layer in range(5)}
        spec = plan.spec(made)
        for layer, wanted in made.items():
            got = [group["method"] for group in spec if layer in group["options"]["layers"]]
            assert got == [entry.method for entry in wanted]


def test_layers_with_the_same_prefix_share_its_mlp(toy, key):
    built = jpeft.build({0: [Entry("prefix", {"mlp_hidden": 4})], 1: [Entry("prefix", {"mlp_hidden": 4})]})
    leaves = jpeft.init(built, key, toy.sites)
    assert list(leaves) == ["prefix_0"]
    assert len(leaves["prefix_0"]) == 3


def test_a_plan_equals_the_chain_written_by_hand(toy, key):
    built = jpeft.build({0: [ADAPTER], 1: [LORA]})
    by_hand = jpeft.chain(jpeft.pfeiffer(3, layers=[0]), jpeft.lora(2, layers=[1]))
    leaves = randomised(jpeft.init(built, key, toy.sites))
    chex.assert_trees_all_equal_shapes(leaves, jpeft.init(by_hand, key, toy.sites))
    chex.assert_trees_all_equal(toy.logits(built, leaves), toy.logits(by_hand, leaves))
    assert "encoder/layer_0/attention/query" not in leaves["lora_0"]


def test_json_in_and_out():
    made = {0: [LORA, ADAPTER], 11: [Entry("prefix")]}
    assert plan.loads(plan.dumps(made)) == made
    assert plan.dumps(made).count("\n") == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a plan"),
        ('{"a": []}', "is not a plan"),
        ('{"00": []}', "is not a plan"),
        ('{"0": [{"method": "lora", "options": {"rank": 2.5}}]}', "rank must be an integer, got 2.5"),
        ('{"0": {}}', "is not a plan"),
        ('{"0": ["lora"]}', "layer 0: expected a method and its options"),
        ('{"0": [{"method": "lroa"}]}', "layer 0: method 'lroa' is unknown: did you mean 'lora'"),
        ('{"0": [{"method": "lora", "options": {"rnk": 3}}]}', "no option 'rnk': did you mean 'rank'"),
        ('{"3": [{"method": "lora", "options": {"rank": 0}}]}', "layer 3: rank must be positive"),
        ('{"0": [{"method": "lora", "options": {"layers": [0]}}]}', "drop the option 'layers'"),
        ('{"0": [{"method": "lora", "options": {"alpha": "x"}}]}', "layer 0: alpha must be a finite number, got 'x'"),
        ('{"0": [{"method": "lora", "options": {"alpha": Infinity}}]}', "alpha must be a finite number, got inf"),
        (f'{{"0": [{{"method": "lora", "options": {{"alpha": 1{"0" * 400}}}}}]}}', "alpha must be a finite number"),
        ('{"0": [{"method": "lora", "options": {"alpha": NaN}}]}', "alpha must be a finite number, got nan"),
        ('{"0": [{"method": "lora", "options": {"rank": true}}]}', "rank must be an integer, got True"),
        ('{"0": [{"method": "lora", "options": {"gate": "yes"}}]}', "gate must be true or false, got 'yes'"),
        (
            '{"0": [{"method": "lora", "options": {"rank_pattern": 3}}]}',
            "rank_pattern must be an object or null, got 3",
        ),
        ('{"0": [{"method": "fish"}]}', "fish acts on the whole model and cannot be put into a layer"),
        ("{}", "has no module in any layer: to train the head alone, use the method 'head'"),
        ('{"0": [], "1": []}', "has no module in any layer"),
        ('{"0": [{"method": "lora"}], "0": []}', "'0' occurs twice in one object"),
        ('{"0": [{"method": "lora", "options": {"rank": 1, "rank": 2}}]}', "'rank' occurs twice"),
        ("[" * 200_000, "is not JSON"),
        ('{"0": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"0": [{"method": ["lora"]}]}', "layer 0: expected a method and its options"),
        ('{"0": [{"method": 3}]}', "layer 0: expected a method and its options"),
        ('{"0": [{"method": "lora", "options": 3}]}', "layer 0: expected a method and its options"),
        ('{"0": [{"method": "lora", "options": null}]}', "layer 0: expected a method and its options"),
    ],
)
def test_what_is_no_plan(text, message):
    with pytest.raises(UserError, match=message):
        plan.loads(text, "a plan")


def test_named_plans_and_files(tmp_path):
    assert plan.read("thesis_sst2")[4] == [Entry("prefix")]
    file = tmp_path / "plan.json"
    file.write_text(plan.dumps({0: [LORA]}))
    assert plan.read(str(file)) == {0: [LORA]}
    with pytest.raises(UserError, match="did you mean 'thesis_mnli'"):
        plan.read("thesis_mnl")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"plan\.json is not UTF-8"):
        plan.read(str(tmp_path / "plan.json"))


def test_a_plan_can_be_given_as_json_itself():
    mixed = {0: [LORA], 1: [ADAPTER]}
    assert plan.read(plan.dumps(mixed)) == mixed
    with pytest.raises(UserError, match="plan is not JSON"):
        plan.read("{")


def test_every_kind_of_a_plan_trains_at_its_own_rate():
    mixed = {0: [Entry("lora", {"learning_rate_ratio": 4.0})], 1: [ADAPTER, Entry("prefix")]}
    rate = rates(plan.build(mixed, {"lora": 0.5, "pfeiffer": 3.0}))
    assert rate(("lora_0", "encoder/layer_0/attention/query", "a")) == 0.5
    assert rate(("lora_0", "encoder/layer_0/attention/query", "b")) == 2.0  # as LoRA+ has it, times the kind's
    assert rate(("pfeiffer_0", "encoder/layer_1/ffn_add_norm", "down", "kernel")) == 3.0
    assert rate(("prefix_0", "shared", "embedding")) == 1.0


def test_a_module_at_another_size():
    assert plan.resized(Entry("lora", {"rank": 4, "targets": "query"}), 2).options == {
        "rank": 8, "alpha": 32.0, "targets": "query",
    }  # fmt: skip
    # Its scale is alpha over the root of the rank.
    assert plan.resized(Entry("rslora", {"rank": 4, "alpha": 8.0}), 4).options == {"rank": 16, "alpha": 16.0}
    patterned = {"rank": 4, "alpha": 8.0, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3.0}}
    assert plan.resized(Entry("lora", patterned), 2).options == {
        "rank": 8, "alpha": 16.0, "rank_pattern": {"query": 4}, "alpha_pattern": {"value": 6.0},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"lora has rank 1, which cannot be made 0\.5 times as large"):
        plan.resized(Entry("lora", {"rank": 4, "rank_pattern": {"query": 1}}), 0.5)
    assert plan.resized(Entry("houlsby", {"bottleneck": 6}), 0.5).options == {"bottleneck": 3}
    assert plan.resized(Entry("mam"), 0.5).options == {"num_virtual_tokens": 15, "bottleneck": 256}
    with pytest.raises(UserError, match=r"lora has rank 3, which cannot be made 0\.5 times as large"):
        plan.resized(Entry("lora", {"rank": 3}), 0.5)
    with pytest.raises(UserError, match="bitfit comes in one size only"):
        plan.resized(Entry("bitfit"), 2)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({-1: [Entry("lora")]}, "got layer -1"),
        ({True: [Entry("lora")]}, "got layer True"),
        ({0: ["lora"]}, "layer 0: expected a list of jpeft.Entry"),
        ({0: "lora"}, "layer 0: expected a list of jpeft.Entry"),
        ({0: [Entry("lora", {"layers": [1]})]}, "drop the option 'layers' of lora"),
        ({0: [Entry("lora")] * 65}, "layer 0 has 65 modules"),
        ({}, "no module in any layer: for the plain model"),
        ({0: [], 1: []}, "no module in any layer"),
        ({0: [Entry("lora", None)]}, r"layer 0: expected the name of a method and {option: value}, got Entry\("),
        ({0: [Entry(["lora"])]}, "layer 0: expected the name of a method"),
        ({0: [Entry("lora", {1: 2})]}, "layer 0: expected the name of a method"),
        ({0: [Entry("lora", {"rank_pattern": {"(": 4}})]}, r"pattern '\(' is not a regular expression"),
        ({0: [Entry("lora", {"alpha_pattern": {"(": 4}})]}, r"pattern '\(' is not a regular expression"),
        (None, "expected a plan, .*, or its spec, got None"),
        ([{"method": "lora", "options": {}, "x": 1}], "expected groups"),
        ([{"method": "lora", "options": None}], "expected groups"),
        ([{"method": "lora", "options": {"layers": [0, 0]}}], r"layers names a layer twice: \[0, 0\]"),
        ([{}], "expected groups"),
        ([{"method": "lora"}], "expected groups"),
    ],
)
def test_what_cannot_be_built(made, says):
    with pytest.raises(UserError, match=says):
        plan.build(made)


def test_the_plain_model_is_an_empty_spec():
    assert plan.build([]).members == ()


@pytest.mark.parametrize(
    "rates",
    [{"lora": float("nan")}, {"lora": "x"}, {"lroa": 1.0}, {"lora": 0}, [1], {"lora": True}, {"lora": 10**400}],
)
def test_rates_that_are_none(rates):
    with pytest.raises(UserError, match="rates must be"):
        plan.build({0: [Entry("lora")]}, rates)


def test_a_plan_of_thousands_of_modules_in_a_layer():
    with pytest.raises(UserError, match="layer 0: 2,000 modules, expected at most 64"):
        plan.loads(json.dumps({"0": [{"method": "lora"}] * 2000}))


def test_a_layer_that_does_not_exist():
    assert plan.check({0: [LORA]}, 1) == {0: [LORA]}
    with pytest.raises(UserError, match="layer 12, but the model has layers 0-11"):
        plan.check({12: [LORA]}, 12)


@pytest.mark.parametrize(
    ("name", "trains", "with_head", "adds"),
    [("thesis_mnli", 1.45, 1.93, 0.43), ("thesis_mrpc", 1.45, 1.93, 0.43), ("thesis_sst2", 3.82, 4.30, 0.36)],
)
def test_the_plans_of_the_thesis_have_its_sizes_on_roberta_base(name, trains, with_head, adds):
    config = BertConfig(
        model_type="roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
    )
    model, ids = Bert(config), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 8), jnp.int32)))["params"]
    sites, method = jpeft.sites(model, ids), jpeft.build(plan.read(name))
    leaves = jax.eval_shape(lambda: jpeft.init(method, jax.random.key(0), sites))
    left = jax.eval_shape(lambda leaves, params: jpeft.merge(method, jpeft.fold(method, leaves), params).leaves, leaves, params)  # fmt: skip  # noqa: E501
    total, head, modules = tree.count(params), tree.count(params["classifier"]), tree.count(leaves)
    assert total == 124_647_170
    assert round(100 * modules / total, 2) == trains
    assert round(100 * (modules + head) / total, 2) == with_head
    assert round(100 * tree.count(left) / total, 2) == adds


def test_an_option_that_is_a_list_of_something_else():
    with pytest.raises(UserError, match="template must be a list or null"):
        plans.make("p_tuning", template=[None])
    with pytest.raises(UserError, match="layers must be a list of integers or null, got"):
        plans.make("lora", layers=("0",))
