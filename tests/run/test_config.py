import inspect
import json
import re

import pytest
from flax.traverse_util import flatten_dict

from jpeft.core.errors import UserError
from jpeft.models import BertConfig
from jpeft.plans.plan import Entry
from jpeft.run import checks
from jpeft.run import config as configs
from jpeft.transforms.registry import METHODS, MODULES
from jpeft.version import RESULTS


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


def test_every_field_is_explained():
    """Where --help sends its readers."""
    fields = flatten_dict(configs.default("mnli", "lora").to_dict(), sep=".")
    names = {re.sub(r"^(fishpal\.(factors|learning_rates))\..*", r"\1", name) for name in fields}
    starts = [line.split(":")[0] for line in configs.default.__doc__.splitlines() if line.strip().startswith("- ")]
    explained = {name for start in starts for name in re.findall(r"`([\w.]+)`", start)}
    assert explained == {name for name in names if not name.startswith("peft.")} | {"peft"}


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


@pytest.mark.parametrize("method", METHODS)
def test_every_default_passes_the_check_and_is_json(method):
    config = configs.default("mnli", method)
    checks.check(config)
    assert json.loads(config.to_json())["method"] == method


def test_method_names_are_fishpal_selections_and_methods():
    assert set(METHODS) == {"fishpal", "full", "head", *MODULES}


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
    checks.check(demo)
    with pytest.raises(UserError, match="config variant 'dmo' is unknown: did you mean 'demo'"):
        configs.variant(make(), "dmo")


def test_methods_joined_by_plus_are_a_chain_with_the_first_one_s_learning_rate():
    config = make(method="ia3+layer_norm", peft__ia3__placement="before")
    checks.check(config)
    assert configs.modules(config) == [
        {"method": "ia3", "options": {"placement": "before"}},
        {"method": "layer_norm", "options": {}},
    ]
    assert configs.learning_rate(config) == METHODS["ia3"].learning_rate
    with pytest.raises(UserError, match=r"config.method 'layernorm' is unknown.*'layer_norm'"):
        checks.check(make(method="ia3+layernorm"))
    with pytest.raises(UserError, match=r"'full' stands alone"):
        checks.check(make(method="lora+full"))
    assert configs.modules(make(method="head")) == []


def test_patterns_of_a_method_are_set_as_a_dict():
    config = make(method="lora")
    config.peft.lora.rank_pattern = {"query": 4}
    checks.check(config)
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


def test_rates_race_where_nothing_else_says_them():
    config = configs.default("mrpc", "fishpal")
    config.train.num_epochs = 5
    assert configs.raced_rates(config) == (1, 4)
    for fields in (
        {"train.num_epochs": 6},
        {"train.learning_rate": 1e-3},
        {"fishpal.learning_rates.lora": 1e-3},
        {"fishpal.criterion": "thesis"},
        {"fishpal.plan": '{"0": [{"method": "lora"}]}'},
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(fields)
        assert configs.raced_rates(other) == (1,)
    assert configs.raced_rates(configs.default("mrpc", "lora")) == (1,)
    config.train.num_epochs, config.fishpal.rates = 10, (1, 2)  # that were asked for
    assert configs.raced_rates(config) == (1, 2)
    config.fishpal.rates = (1, 4)  # though they are those of short runs
    assert configs.raced_rates(config) == (1, 4)
    config.train.num_epochs, config.fishpal.rates = 5, None
    assert configs.chosen(config) == {
        "fishpal.rates": (1, 4),
        "train.num_epochs": 5,
    }  # runs of versions without a race of rates were others
    assert configs.chosen(configs.default("mrpc", "lora")) == {}


def test_the_rates_of_the_methods_are_those_that_the_number_of_results_knows():
    """Where a run says none, its config does not say which it had: a new default needs a line in `results`."""
    own = {}
    for name, method in METHODS.items():
        own.setdefault(method.learning_rate, []).append(name)
    assert (RESULTS, own) == (5, {
        5e-4: ["fishpal", "adamix", "adapterdrop", "dora", "houlsby", "lora", "parallel", "pfeiffer", "pissa",
               "sparse_adapter", "unipelt"],
        2e-5: ["full"],
        1e-3: ["head", "bitfit", "krona", "layer_norm", "p_tuning"],
        5e-5: ["far", "top_k_layers"],
        1.6e-3: ["fish", "magnitude_mask", "random_mask"],
        3e-3: ["ia3", "ladder_side"],
        1e-4: ["mam"],
        2e-4: ["prefix", "rslora"],
        5e-3: ["prompt", "said"],
    })  # fmt: skip


def test_a_change_that_concerns_few_runs_has_a_number_of_its_own():
    def results(method, act="gelu", rows=0, dtype="float32", epochs=5, learning_rate=None, **fishpal):
        config = configs.default("mrpc", method)
        config.train.update(dtype=dtype, num_epochs=epochs, learning_rate=learning_rate)
        config.fishpal.update(fishpal)
        return configs.results(config, BertConfig(hidden_act=act), rows)

    assert results("lora", "relu") == results("ladder_side") == results("fishpal", sizes=(1, 2)) == RESULTS
    assert results("bitfit", dtype="bfloat16") == 6
    assert results("fish") == results("mam") == 6
    assert results("fish", learning_rate=1e-3) == RESULTS
    assert results("lora+prompt") == results("fishpal", candidates=("lora", "p_tuning")) == 6
    assert results("ladder_side", "relu") == results("fishpal", candidates=("rslora",), sizes=(1, 2)) == 6
    assert results("fishpal", candidates=("rslora",)) == results("full") == results("bitfit") == RESULTS
    assert results("fishpal", budget="1%") == results("fishpal", rows=8000) == 6  # 2,500 steps
    assert results("fishpal", rows=6000) == results("fishpal", rows=8000, candidates=("lora", "pfeiffer")) == RESULTS
    assert results("fishpal", rows=8000, plan="thesis_mrpc", budget="1%") == RESULTS
    assert results("fishpal", epochs=6) == 6
    assert results("fishpal", epochs=6, rates=(1, 2)) == results("fishpal", epochs=6, criterion="trace") == RESULTS


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
