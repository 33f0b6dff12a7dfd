import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from run.test_config import make

from jpeft.core.errors import UserError
from jpeft.run import checks
from jpeft.run import config as configs


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
        ({"fishpal__candidates": ("lora", "fish")}, "config.fishpal.candidates: fish acts on the whole model"),
        ({"fishpal__sizes": (1, 1)}, "config.fishpal.sizes must be distinct"),
        ({"train__learning_rate": 1e-320}, "config.train.learning_rate must be above 0"),
        ({"fishpal__candidates": ()}, "config.fishpal.candidates must name at least one"),
        ({"fishpal__plan": "thesis_mnil"}, "'thesis_mnil' is neither a file nor a named plan"),
        ({"fishpal__num_examples": 0}, "config.fishpal.num_examples must be from 1 to 1,000,000,000, got 0"),
        ({"fishpal__factors__lora": 0.0}, "config.fishpal.factors.lora must be above 0 and below 1,000,000, got 0.0"),
        (
            {"fishpal__factors__lora": float("nan")},
            "config.fishpal.factors.lora must be above 0 and below 1,000,000, got nan",
        ),
        (
            {"train__group_by_length": True, "train__padded_lengths": 2},
            "config.train.padded_lengths is of random batches",
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
        ({"quantise": "nf5"}, "config.quantise 'nf5' is unknown: did you mean 'nf4'"),
        ({"quantise_except": "query"}, "config.quantise_except is set, but config.quantise is not: drop it"),
        ({"method": "full", "quantise": "nf4"}, "config.quantise is set, but config.method 'full' trains the kernels"),
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
        (
            {"fishpal__num_examples": 8},
            "config.fishpal.num_examples is set, but config.fishpal.criterion 'race' says itself how many",
        ),
        ({"fishpal__budget_of": "added"}, "config.fishpal.budget_of is set, but config.fishpal.budget is not"),
        (
            {"fishpal__criterion": "thesis", "fishpal__learning_rates__lora": 0.1},
            "fishpal.learning_rates.lora is set, but with the thesis' criterion there is one rate",
        ),
        (
            {"fishpal__plan": "thesis_mnli", "fishpal__budget": "1%"},
            "config.fishpal.budget is set, but config.fishpal.plan is set, and nothing is chosen",
        ),
        (
            {"fishpal__criterion": "thesis", "fishpal__factors__krona": 2.0},
            "config.fishpal.factors.krona is set, but 'krona' is not one of config.fishpal.candidates",
        ),
        (
            {"fishpal__learning_rates__krona": 0.1},
            "config.fishpal.learning_rates.krona is set, but 'krona' is not one of config.fishpal.candidates",
        ),
        (
            {"fishpal__plan": '{"0": [{"method": "lora"}]}', "fishpal__learning_rates__prefix": 0.1},
            "config.fishpal.learning_rates.prefix is set, but 'prefix' is not in config.fishpal.plan",
        ),
        ({"fishpal__sizes": (0,)}, "config.fishpal.sizes must be above 0 and below 1,000,000, got 0"),
        ({"fishpal__sizes": (0.3,)}, "config.fishpal.sizes: lora has rank 8, which cannot be made 0.3 times as large"),
        ({"fishpal__sizes": (2,), "fishpal__candidates": ("ia3",)}, "config.fishpal.sizes: ia3 comes in one size only"),
        ({"fishpal__budget": "many"}, "config.fishpal.budget must be a number of parameters or a percentage, '0.5%'"),
        ({"fishpal__budget": "-1%"}, "config.fishpal.budget must be a number of parameters or a percentage, '0.5%'"),
        (
            {"fishpal__budget": "1%", "fishpal__criterion": "trace", "peft__lora__rank_pattern": {"layer_0/.*": 4}},
            "config.fishpal.budget takes a candidate to be of one size in all layers, which lora with a rank_pattern",
        ),
        ({"fishpal__budget_of": "all"}, "config.fishpal.budget_of must be 'trainable' or 'added', got 'all'"),
        (
            {"fishpal__rates": (1, 2), "train__learning_rate": 1e-3},
            "config.fishpal.rates is set, but a learning rate is given: drop it",
        ),
        (
            {"fishpal__rates": (1, 2), "fishpal__criterion": "trace"},
            "config.fishpal.rates is set, but config.fishpal.criterion is 'trace', and only a race tries rates",
        ),
        ({"fishpal__rates": ()}, "config.fishpal.rates must be distinct, at least one, got ()"),
        ({"fishpal__rates": (4, 4)}, "config.fishpal.rates must be distinct, at least one, got (4, 4)"),
        ({"fishpal__rates": (1, -1)}, "config.fishpal.rates must be above 0 and below 1,000,000, got -1"),
        (
            {"fishpal__learning_rates__lora": 0.0},
            "config.fishpal.learning_rates.lora must be above 0 and below 1,000,000, got 0.0",
        ),
        ({"method": "lora", "fishpal__num_examples": 4}, "config.fishpal.num_examples is set, but config.method is"),
        ({"method": "adapter"}, "config.method 'adapter' is called 'pfeiffer'"),
        (
            {"fishpal__plan": "thesis_mnli", "fishpal__criterion": "kernel"},
            "config.fishpal.criterion is set, but config.fishpal.plan is set, and nothing is chosen: drop it",
        ),
        ({"fishpal__plan": "thesis_mnli", "peft__lora__rank": 4}, "is set, but config.fishpal.plan brings its own"),
        ({"task": "synthetic", "data__path": "x"}, "config.data.path is set, but config.task 'synthetic' does not"),
        ({"task": "custom"}, "config.task 'custom' needs config.data.train: expected a CSV"),
        ({"task": "custom", "data__hub": "a/b"}, "config.task 'custom' needs config.data.text: expected one or"),
        ({"data__hub": "a/b"}, "config.data.hub is set, but config.task 'mnli' does not read it"),
        ({"task": "custom", "data__train": "x.csv"}, "config.task 'custom' needs config.data.text: expected one or"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(UserError) as caught:
        checks.check(make(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
        checks.check(config)
        configs.candidates(config)
        configs.rates(config)
        configs.task_of(config)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
