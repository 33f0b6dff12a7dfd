import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jpeft.core.errors import UserError
from jpeft.plans.plan import Entry
from jpeft.run import config as configs
from jpeft.transforms.registry import METHODS, MODULES


def make(**changes):
    """The default FishPAL run on MNLI with fields set by dotted name, "__" for "."."""
    config = configs.default("mnli", "fishpal")
    with config.unlocked():
        for name, value in changes.items():
            *sections, field = name.split("__")
            section = config
            for part in sections:
                section = section[part]
            section[field] = value
    return config


@pytest.mark.parametrize("method", MODULES)
def test_sections_have_the_defaults_of_the_signatures(method):
    parameters = inspect.signature(METHODS[method].make).parameters
    assert configs.default("mnli", method).peft[method].to_dict() == {n: p.default for n, p in parameters.items()}


def test_fields_without_a_default_take_their_type():
    config = configs.default("mnli", "lora")
    config.peft.lora.layers = (0, 1)
    config.peft.pfeiffer.bottleneck = 48
    config.data.path = "folder"
    config.train.learning_rate = 1e-3
    with pytest.raises(TypeError):
        config.peft.pfeiffer.bottleneck = "wide"
    with pytest.raises(TypeError):
        config.train.learning_rate = "fast"


@pytest.mark.parametrize("method", configs.method_names())
def test_every_default_passes_the_check_and_is_json(method):
    config = configs.default("mnli", method)
    configs.check(config)
    assert json.loads(config.to_json())["method"] == method


def test_method_names_are_fishpal_selections_and_methods():
    assert set(configs.method_names()) == {"fishpal", "full", "head", *MODULES}


def test_learning_rate_is_the_method_s_unless_given():
    for method in METHODS:
        assert configs.learning_rate(configs.default("mnli", method)) == METHODS[method].learning_rate
    assert configs.learning_rate(make()) == 5e-4
    assert configs.learning_rate(make(train__learning_rate=0.25)) == 0.25


def test_options_are_those_that_differ():
    config = make(peft__lora__rank=4, peft__lora__layers=(0, 2), peft__pfeiffer__bottleneck=None)
    assert configs.options(config, "lora") == {"rank": 4, "layers": (0, 2)}
    assert configs.options(config, "pfeiffer") == {}
    config.peft.lora.rank = 8
    assert configs.options(config, "lora") == {"layers": (0, 2)}


def test_variants():
    assert configs.variant(make(), "").model == "bert-base-uncased"
    demo = configs.variant(make(), "demo")
    assert (demo.model, demo.task, demo.method, demo.seeds) == ("minilm", "synthetic", "fishpal", (11,))
    configs.check(demo)
    with pytest.raises(UserError, match="config variant 'dmo' is unknown: did you mean 'demo'"):
        configs.variant(make(), "dmo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "mnil"}, "config.task 'mnil' is unknown: did you mean 'mnli'?"),
        ({"method": "lroa"}, "config.method 'lroa' is unknown: did you mean 'lora'"),
        ({"peft__lora__rank": 0}, "config.peft.lora: rank must be positive, got 0"),
        ({"peft__lora__dropout": 1.0}, "config.peft.lora: dropout must be at least 0 and below 1, got 1.0"),
        ({"peft__pfeiffer__activation": "rleu"}, "config.peft.pfeiffer: activation 'rleu' is unknown"),
        ({"fishpal__candidates": ("lora", "adaptor")}, "config.fishpal.candidates: 'adaptor' is unknown"),
        ({"fishpal__candidates": ("lora", "lora")}, "config.fishpal.candidates must name at least one"),
        ({"fishpal__candidates": ()}, "config.fishpal.candidates must name at least one"),
        ({"fishpal__plan": "thesis_mnil"}, "'thesis_mnil' is neither a file nor a named plan"),
        ({"fishpal__num_examples": 0}, "config.fishpal.num_examples must be from 1 to 1,000,000,000, got 0"),
        ({"fishpal__factors__lora": 0.0}, "config.fishpal.factors.lora must be above 0 and below 1,000,000, got 0.0"),
        (
            {"fishpal__factors__lora": float("nan")},
            "config.fishpal.factors.lora must be above 0 and below 1,000,000, got nan",
        ),
        ({"train__num_epochs": 0}, "config.train.num_epochs must be from 1 to 100,000, got 0"),
        ({"train__batch_size": -1}, "config.train.batch_size must be from 1 to 16,384, got -1"),
        ({"train__max_train_examples": 0}, "config.train.max_train_examples must be from 1 to 1,000,000,000, got 0"),
        ({"train__max_length": 7}, "config.train.max_length must be from 8 to 65,536, got 7"),
        ({"train__weight_decay": -0.1}, "config.train.weight_decay must be from 0 to 100, got -0.1"),
        ({"train__weight_decay": float("nan")}, "config.train.weight_decay must be from 0 to 100, got nan"),
        ({"train__learning_rate": 0.0}, "config.train.learning_rate must be above 0 and below 1,000,000, got 0.0"),
        (
            {"train__learning_rate": float("inf")},
            "config.train.learning_rate must be above 0 and below 1,000,000, got inf",
        ),
        ({"train__warmup_ratio": 1.0}, "config.train.warmup_ratio must be at least 0 and below 1, got 1.0"),
        ({"train__warmup_ratio": -0.1}, "config.train.warmup_ratio must be at least 0 and below 1, got -0.1"),
        ({"train__dtype": "float16"}, "config.train.dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"seeds": ()}, "config.seeds must be a tuple of integers from 0 to 2**32 - 1, at least one"),
        ({"seeds": (1, 1)}, "config.seeds must be distinct, got (1, 1)"),
        ({"seeds": (1, -1)}, "config.seeds must be a tuple of integers"),
        ({"seeds": (0, 2**32)}, "config.seeds must be a tuple of integers from 0 to 2**32 - 1"),
        ({"seeds": (True,)}, "config.seeds must be a tuple of integers"),
        ({"seeds": (1.5,)}, "config.seeds must be a tuple of integers"),
        ({"peft__lora__layers": (0, 1)}, "config.peft.lora.layers is set, but fishpal itself chooses the layers"),
        ({"peft__ia3__layers": (0,)}, "config.peft.ia3.layers is set, but config.fishpal.candidates are lora"),
        ({"method": "lora", "peft__pfeiffer__bottleneck": 4}, "config.peft.pfeiffer.bottleneck is set, but config.me"),
        ({"fishpal__criterion": "adam"}, "config.fishpal.criterion 'adam' is unknown: did you mean 'adam_step'"),
        ({"fishpal__sizes": ()}, "config.fishpal.sizes must name at least one size"),
        ({"fishpal__factors__lora": 2.0}, "fishpal.factors.lora is set, but config.fishpal.criterion is 'race'"),
        ({"fishpal__num_examples": 8}, "config.fishpal.num_examples is set, but a race says itself how many"),
        ({"fishpal__budget_of": "added"}, "config.fishpal.budget_of is set, but config.fishpal.budget is not"),
        (
            {"fishpal__criterion": "thesis", "fishpal__learning_rates__lora": 0.1},
            "fishpal.learning_rates.lora is set, but with the thesis' criterion there is one rate",
        ),
        (
            {"fishpal__plan": "thesis_mnli", "fishpal__budget": "1%"},
            "config.fishpal.budget is set, but config.fishpal.plan is set, and nothing is chosen",
        ),
        ({"fishpal__sizes": (0,)}, "config.fishpal.sizes must be above 0 and below 1,000,000, got 0"),
        ({"fishpal__sizes": (0.3,)}, "config.fishpal.sizes: lora has rank 8, which cannot be made 0.3 times as large"),
        ({"fishpal__sizes": (2,), "fishpal__candidates": ("ia3",)}, "config.fishpal.sizes: ia3 comes in one size only"),
        ({"fishpal__budget": "many"}, "config.fishpal.budget must be a number of parameters or a percentage, '0.5%'"),
        ({"fishpal__budget": "-1%"}, "config.fishpal.budget must be a number of parameters or a percentage, '0.5%'"),
        ({"fishpal__budget_of": "all"}, "config.fishpal.budget_of must be 'trainable' or 'added', got 'all'"),
        (
            {"fishpal__learning_rates__lora": 0.0},
            "config.fishpal.learning_rates.lora must be above 0 and below 1,000,000, got 0.0",
        ),
        ({"method": "lora", "fishpal__num_examples": 4}, "config.fishpal.num_examples is set, but config.method is"),
        ({"method": "adapter"}, "config.method 'adapter' is called 'pfeiffer'"),
        ({"fishpal__plan": "thesis_mnli", "peft__lora__rank": 4}, "is set, but config.fishpal.plan brings its own"),
        ({"task": "synthetic", "data__path": "x"}, "config.data.path is set, but config.task 'synthetic' does not"),
        ({"task": "custom"}, "config.task 'custom' needs config.data.train: expected a CSV"),
        ({"task": "custom", "data__train": "x.csv"}, "config.task 'custom' needs config.data.text: expected one or"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(UserError) as caught:
        configs.check(make(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_methods_joined_by_plus_are_a_chain_with_the_first_one_s_learning_rate():
    config = make(method="ia3+layer_norm", peft__ia3__placement="before")
    configs.check(config)
    assert configs.modules(config) == [
        {"method": "ia3", "options": {"placement": "before"}},
        {"method": "layer_norm", "options": {}},
    ]
    assert configs.learning_rate(config) == METHODS["ia3"].learning_rate
    with pytest.raises(UserError, match=r"config.method 'layernorm' is unknown.*'layer_norm'"):
        configs.check(make(method="ia3+layernorm"))
    with pytest.raises(UserError, match=r"'full' stands alone"):
        configs.check(make(method="lora+full"))
    assert configs.modules(make(method="head")) == []


def test_patterns_of_a_method_are_set_as_a_dict():
    config = make(method="lora")
    config.peft.lora.rank_pattern = {"query": 4}
    configs.check(config)
    assert configs.options(config, "lora") == {"rank_pattern": {"query": 4}}


def test_each_kind_trains_at_its_own_rate_but_by_the_thesis_at_one():
    config = make()
    rates = configs.rates(config)
    assert rates["lora"] == rates["pfeiffer"] == pytest.approx(1.0)
    assert rates["prefix"] == pytest.approx(2e-4 / 5e-4)
    assert configs.rates(make(train__learning_rate=2e-3)) == rates  # all scale with the learning rate
    own = configs.rates(make(train__learning_rate=2e-3, fishpal__learning_rates__prefix=1e-3))
    assert own["prefix"] == pytest.approx(0.5)
    assert configs.rates(make(fishpal__criterion="thesis")) == {}
    assert configs.rates(make(method="lora")) == {}


def test_candidates_come_in_sizes():
    found = configs.candidates(make(fishpal__sizes=(0.5, 1), peft__lora__rank=4))
    assert found == {
        "lora x0.5": Entry("lora", {"rank": 2, "alpha": 8.0}),
        "lora": Entry("lora", {"rank": 4}),
        "pfeiffer x0.5": Entry("pfeiffer", {"reduction_factor": 32.0}),
        "pfeiffer": Entry("pfeiffer", {}),
        "prefix x0.5": Entry("prefix", {"num_virtual_tokens": 5}),
        "prefix": Entry("prefix", {}),
    }


@pytest.mark.parametrize(("given", "found"), [("0.5%", (0.5, True)), ("100,000", (1e5, False)), ("2e4", (2e4, False))])
def test_a_budget_is_a_number_or_a_percentage(given, found):
    assert configs.budget(make(fishpal__budget=given)) == found


def fields(config, path=()):
    """The paths of all fields, with their types."""
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from fields(config[name], (*path, name))
        else:
            yield (*path, name), config.get_type(name)


FIELDS = dict(fields(configs.default("mrpc", "fishpal")))
VALUES = {
    int: [-1, 0, 1, 7, 2**32, 10**30],
    float: [float("nan"), float("inf"), -1.0, 0.0, 1e-3, 1e308],
    str: ["", "x", "(", "\ud800", "../x", "1%", "-5", "nan", "[]", "{}"],
    tuple: [(), (0,), (-1,), ("x",), (None,), (1, 1), (10**9,), ((),), (float("nan"),)],
    bool: [True, False],
    dict: [{}, {"(": 2}, {"a": -1}, {"query": 10**9}, {"query": None}, {"query": "x"}],
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    path=st.sampled_from(sorted(FIELDS)),
    other=st.sampled_from(sorted(FIELDS)),
    task=st.sampled_from(("mrpc", "custom")),
    own=st.booleans(),
    data=st.data(),
)
def test_any_values_pass_the_check_or_are_one_line(path, other, task, own, data):
    config = configs.default(task, path[1] if own and path[0] == "peft" else "fishpal")
    if task == "custom":
        config.data.train, config.data.text = "nothing.csv", ("a",)
    for names in {path, other}:
        section = config
        for name in names[:-1]:
            section = section[name]
        try:
            section[names[-1]] = data.draw(st.sampled_from(VALUES[FIELDS[names]]))
        except (TypeError, OverflowError):  # as the command line would say at once
            continue
    try:
        configs.check(config)
        configs.candidates(config)
        configs.rates(config)
        configs.task_of(config)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
