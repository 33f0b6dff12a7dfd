"""Every criterion on a tiny run: what it costs, what it reads, and the plan that comes of it."""

import json

import jax
import numpy as np
import pytest

from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.data import batching
from jpeft.data.batching import Examples
from jpeft.plans import gains
from jpeft.plans import plan as plans
from jpeft.plans.budget import Cost
from jpeft.run import checks, choose, criteria, experiment, loading, measuring, trials
from jpeft.run import config as configs
from jpeft.run.console import Console
from jpeft.run.seed import begin
from jpeft.training import optim
from jpeft.training.trial import Reached

QUIET = Console(quiet=True)


MEASURED = ("thesis", "trace", "adam_step", "shuffled_labels", "kernel")  # on as many examples as are asked for


@pytest.fixture
def seed(tiny_config, tmp_path):
    """A seed that could be trained, for a criterion."""

    def make(criterion, task="mrpc", **fields):
        config = tiny_config("fishpal", task, num_epochs=1, max_length=8)
        config.fishpal.update(criterion=criterion, num_examples=8 if criterion in MEASURED else None, **fields)
        checks.check(config)
        return begin(config, 11, *loading.load(config, QUIET)[:2], tmp_path, QUIET)

    return make


def score(seed, criterion, task="mrpc"):
    """What a criterion finds: scores of every candidate in every layer."""
    found = criteria.CRITERIA[criterion](seed(criterion, task), CANDIDATES)
    assert list(found.scores) == [0, 1]
    assert all(list(row) == list(CANDIDATES) for row in found.scores.values())
    assert np.isfinite([value for row in found.scores.values() for value in row.values()]).all()
    assert (found.passes > 0) == (criterion not in ("random", "size", "magnitude", "depth"))
    return found.scores


LABELLED = ("adam_step", "shuffled_labels")
ELSEWHERE = ("race", "kernel", "thesis", *LABELLED)  # with tests of their own


@pytest.mark.parametrize("criterion", [name for name in configs.CRITERIA if name not in ELSEWHERE])
def test_every_criterion_scores_every_candidate_in_every_layer(seed, criterion):
    score(seed, criterion)


CANDIDATES = {"pfeiffer": plans.Entry("pfeiffer", {"bottleneck": 4}), "lora": plans.Entry("lora", {"rank": 2})}


def test_the_config_knows_all_criteria():
    assert tuple(criteria.CRITERIA) == configs.CRITERIA


def test_size_counts_what_trains(seed):
    scores = criteria.CRITERIA["size"](seed("size"), CANDIDATES).scores
    assert scores[0] == scores[1] == {"pfeiffer": 2 * 16 * 4 + 4 + 16, "lora": 2 * (16 * 2 + 2 * 16)}


@pytest.mark.slow
def test_a_measurement_depends_on_the_labels_and_a_regression_has_values(seed):
    one, other = (score(seed, name) for name in LABELLED)
    assert one != other
    score(seed, "adam_step", "stsb")


def test_halves_and_the_examples_of_the_head_are_disjoint(seed):
    case = seed("adam_step")
    ready = measuring.prepare(case, 20)
    assert (ready.a.size, ready.b.size, len(ready.rows)) == (10, 10, 20)
    assert ready.passes == pytest.approx((45 - 20) / 3)  # all others, where there are so few
    assert len(set(ready.rows.tolist())) == 20
    changed = ready.params["classifier"]["kernel"] != case.base.params["classifier"]["kernel"]
    assert changed.all()


def test_a_race_is_won_by_the_lowest_loss_of_those_who_are_left(seed, monkeypatch):
    """Three runners: the slow one drops out after a round, although it would have been the fastest in the end."""
    losses = {"slow": [0.9, 0.1], "middle": [0.7, 0.6], "quick": [0.6, 0.65]}
    entries = {name: plans.Entry("lora", {"rank": 2, "alpha": 1.0 + i}) for i, name in enumerate(losses)}

    def trial(seed, entry, *rest):
        name = next(name for name, other in entries.items() if other == entry)
        for loss in losses[name]:
            yield Reached(0, np.full(10, loss))

    monkeypatch.setattr(trials, "tried", trial)
    monkeypatch.setattr(trials, "TELLING", 0)
    found = trials.race(seed("race"), entries)
    first, second = ({n: round(x, 3) for n, x in row.items()} for row in found.about["held_out_losses"])
    assert (first, second) == ({"slow": 0.9, "middle": 0.7, "quick": 0.6}, {"quick": 0.65, "middle": 0.6})
    assert sorted(entries, key=found.scores[0].get) == ["slow", "quick", "middle"]


@pytest.mark.parametrize(("faster", "taken"), [(0.3, 4), (0.5, 1), (0.7, 1)])
def test_the_winner_races_against_itself_at_other_rates(seed, monkeypatch, faster, taken):
    """A tie is for the rate that is named first; the others train as long as the winner did, in one go."""
    entries = {name: plans.Entry("lora", {"rank": 2, "alpha": alpha}) for name, alpha in (("one", 1.0), ("two", 2.0))}
    asked = []

    def trial(seed, entry, params, train, held, every, attribute, rate, averaged):
        asked.append((entry.options["alpha"], every, rate))
        assert averaged == 2  # a third of the four steps to a look
        yield Reached(0, np.full(10, faster if rate == 4 else entry.options["alpha"] / 2))

    monkeypatch.setattr(trials, "tried", trial)
    monkeypatch.setattr(trials, "TELLING", 0)
    found = trials.race(seed("race"), entries)
    assert found.about["rate"] == taken
    assert found.about["rate_losses"] == pytest.approx({"1": 0.5, "4": faster})
    assert asked == [(1.0, 4, 1), (2.0, 4, 1), (1.0, 4, 4)]
    alone = trials.race(seed("race", rates=(1,)), entries)
    assert "rate" not in alone.about
    assert trials.race(seed("race", rates=(2,)), entries).about["rate"] == 2
    assert found.passes - alone.passes == pytest.approx(4 * 16 + 11 / 3)


def test_rates_are_looked_at_over_equally_many_steps(seed, monkeypatch):
    """The winner of two rounds was looked at twice, its rivals once."""
    entries = {name: plans.Entry("lora", {"rank": 2, "alpha": x}) for name, x in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    asked = []

    def trial(seed, entry, params, train, held, every, attribute, rate, averaged):
        while True:
            asked.append((every, averaged))
            yield Reached(0, np.full(10, entry.options["alpha"]))

    monkeypatch.setattr(trials, "tried", trial)
    monkeypatch.setattr(trials, "TELLING", 0)
    monkeypatch.setattr(trials, "race_steps", lambda *_: 6)
    trials.race(seed("race"), entries)
    assert asked == [(6, 2)] * 5 + [(12, 2)]


def test_what_diverges_loses_the_race(seed, monkeypatch):
    entries = {name: plans.Entry("lora", {"rank": 2, "alpha": x}) for name, x in (("one", 1.0), ("two", 2.0))}
    bad = []

    def trial(seed, entry, params, train, held, every, attribute, rate, averaged):
        yield Reached(0, np.full(10, np.nan if (entry.options["alpha"], rate) in bad else 0.5))

    monkeypatch.setattr(trials, "tried", trial)
    monkeypatch.setattr(trials, "TELLING", 0)
    bad += [(1.0, 1), (2.0, 4)]
    found = trials.race(seed("race"), entries)
    assert found.scores[0] == {"one": 1.0, "two": 2.0}
    assert found.about == {"steps": 4, "held_out_losses": [{"two": 0.5}], "rate": 1.0, "rate_losses": {"1": 0.5}}
    bad += [(2.0, 1)]
    with pytest.raises(UserError, match="no candidate has a finite held-out loss after 4 steps"):
        trials.race(seed("race"), entries)


def test_in_a_short_run_all_steps_go_to_the_rates_of_the_first_candidate(seed, monkeypatch):
    entries, asked = {name: plans.Entry("lora", {"rank": 2, "alpha": x}) for name, x in (("a", 1.0), ("b", 2.0))}, []

    def trial(seed, entry, params, train, held, every, attribute, rate, averaged):
        assert params is seed.base.params  # with the head that the run begins with
        rows = [ids.tobytes() for ids in (*train.input_ids, *held.input_ids)]
        assert (sorted(rows), held.size) == (sorted(ids.tobytes() for ids in seed.data.train.input_ids), 11)
        asked.append((entry.options["alpha"], every, rate))
        yield Reached(0, np.full(10, 1 / rate))

    monkeypatch.setattr(trials, "tried", trial)
    found = trials.race(seed("race"), entries)
    assert asked == [(1.0, 4, 1), (1.0, 4, 4)]
    assert found.scores == {0: {"a": 2.0, "b": 1.0}, 1: {"a": 2.0, "b": 1.0}}
    assert found.about["held_out_losses"] == [{"a": 1.0}]
    assert found.about["rate"] == 4
    trials.race(seed("race", rates=(1,)), entries)  # without rates to tell, kinds race however short it is
    assert asked[2:] == [(1.0, 4, 1), (2.0, 4, 1)]


def test_a_rate_leads_by_more_than_the_noise_of_its_own_difference():
    rng = np.random.default_rng(0)
    own, noise = rng.normal(size=400), rng.normal(size=400) / 10  # paired differences have a standard error of 0.005
    losses = {"1": own, "4": own - 0.02 + noise, "16": own - 0.019 + noise}
    assert trials.leading(losses) == "4"
    assert trials.leading({"1": own, "4": own - 0.002 + noise - noise.mean()}) == "1"
    assert trials.leading({"1": own, "4": own + 0.2, "16": own - 0.02 + noise}) == "16"
    assert trials.leading({"1": own, "4": own}) == "1"


def test_a_race_takes_a_tenth_of_the_passes_at_most():
    assert trials.race_steps(1150, [3, 2], 0.02) == 18  # five epochs of MRPC
    assert trials.race_steps(690, [3, 2], 0.052) == 6  # three, where the same share would be 11
    assert 0.052 + 6 * 5 / 690 <= 0.1 < 0.052 + 7 * 5 / 690
    assert trials.race_steps(20, [3, 2], 0.5) == 4


def test_a_lead_within_one_standard_error_is_no_lead():
    own = np.random.default_rng(0).normal(size=400)
    own = (own - own.mean()) / own.std(ddof=1)  # a standard error of 0.05
    losses = {"first": own + 0.04, "far": own + 0.2, "best": own, "near": own + 0.01, "farther": own + 0.3}
    assert trials.ranking(losses) == ["first", "best", "near", "far", "farther"]


def test_a_run_chooses_by_a_race_and_says_what_it_cost(tiny_config, tmp_path, monkeypatch):
    config, asked, schedule = tiny_config("fishpal", num_epochs=1, max_length=8), [], optim.warmup_linear
    config.fishpal.update(criterion="race", num_examples=None)
    monkeypatch.setattr(trials, "leading", lambda losses: "4")
    monkeypatch.setattr(optim, "warmup_linear", lambda rate, *rest: asked.append(rate) or schedule(rate, *rest))
    report = experiment.run(config, tmp_path, QUIET)
    found = json.loads((tmp_path / "seed_11" / "choice.json").read_text())
    scores = {name: found["scores"]["0"][name] for name in config.fishpal.candidates}
    chosen = plans.read(str(tmp_path / "seed_11" / "plan.json"))
    assert [entries[0].method for entries in chosen.values()] == [max(scores, key=scores.get)] * 2
    assert report["choice"]["criterion"] == "race"
    assert report["choice"]["share"] == pytest.approx(found["passes"] / 45)
    assert report["choice"]["rates"] == {"11": found["rate"]} == {"11": 4}
    assert set(asked) == {4 * report["learning_rate"]}  # it trains at the rate that was taken
    page = (tmp_path / "report.md").read_text()
    assert "Chosen by `race`" in page
    assert f"The race also chose a multiple of the learning rate below: {found['rate']:g} times (seed 11)." in page
    assert "](choice.png)" in page


def test_a_plan_within_a_budget(tiny_config, tmp_path):
    config = tiny_config("fishpal", num_epochs=1, max_length=8)
    config.fishpal.update(criterion="depth", sizes=(1, 2), budget="300", num_examples=None)
    report = experiment.run(config, tmp_path, QUIET)
    found = json.loads((tmp_path / "seed_11" / "choice.json").read_text())
    assert list(found["scores"]["0"]) == ["lora", "lora x2", "pfeiffer", "pfeiffer x2", "prefix", "prefix x2"]
    chosen = plans.read(str(tmp_path / "seed_11" / "plan.json"))
    assert list(chosen) == [0, 1]
    assert 148 <= report["parameters"]["trainable"] - report["parameters"]["head"] <= 300


def test_shuffled_labels_stay_where_labels_are():
    ids = tuple(np.ones(n, np.int32) for n in (4, 3))
    words = np.array([[-100, 1, 2, 3], [-100, 4, -100, -100]])
    found = criteria._shuffled(Examples(ids, ids, words, unlabelled=-100), 3)
    assert ((found == -100) == (words == -100)).all()
    assert sorted(found[found != -100]) == [1, 2, 3, 4]
    assert (found != words).any()
    rows = np.arange(9)
    assert sorted(criteria._shuffled(Examples((), (), rows), 1)) == rows.tolist()


def texts(*parts):
    return sorted(ids.tobytes() for part in parts for ids in part.input_ids)


def test_halves_and_the_rows_of_the_head_are_all_rows_once(seed, monkeypatch):
    case, read = seed("adam_step"), []
    monkeypatch.setattr(measuring, "evaluate", lambda *args: read.append(args[3]) or np.zeros((args[3].size, 16)))
    monkeypatch.setattr(measuring.head, "fit_head", lambda params, *rest: params)
    ready = measuring.prepare(case, 20)
    assert texts(ready.a, ready.b, *read) == texts(case.data.train)


def test_a_rival_trains_at_its_multiple_of_the_kinds_own_rate(seed, monkeypatch):
    case, asked, real = seed("race", learning_rates={"pfeiffer": 1e-2}), [], trials.optim.adamw
    monkeypatch.setattr(trials.optim, "adamw", lambda *args: asked.append(args) or real(*args))
    trials.tried(case, CANDIDATES["pfeiffer"], case.base.params, case.data.train, case.data.train, 1, False, 4)
    ((schedule, decay, *parts),) = asked
    assert float(schedule(trials.WARMUP)) == pytest.approx(4 * configs.learning_rate(case.config))
    assert decay == case.config.train.weight_decay
    own = {float(x) for x in jax.tree.leaves(parts[0].rates["peft"])}
    assert own == {configs.rates(case.config)["pfeiffer"]} != {1.0}


def prepared(case, monkeypatch, where):
    a, b = (batching.take(case.data.train, range(*cut)) for cut in ((0, 4), (4, 8)))
    monkeypatch.setattr(where, "prepare", lambda *_: measuring.Prepared(case.base.params, a, b, 0.0, np.arange(8)))
    return a, b


def test_a_loss_drops_on_other_rows_than_are_trained_on(seed, monkeypatch):
    case, seen = seed("loss_drop"), []
    a, b = prepared(case, monkeypatch, trials)

    def tried(seed, entry, params, train, held, *rest):
        seen.append((texts(train), texts(held)))
        while True:
            yield Reached(1, np.ones(4), {"peft": {"lora_0": {"encoder/layer_0/attention/query": {"a": np.ones(2)}}}})

    monkeypatch.setattr(trials, "tried", tried)
    trials.loss_drop(case, {"lora": CANDIDATES["lora"]})
    assert seen == [(texts(a), texts(b))]


def test_a_step_is_taken_on_one_half_and_judged_on_the_other_at_the_kinds_own_rate(seed, monkeypatch):
    case, seen = seed("adam_step", learning_rates={"pfeiffer": 1e-2}), []
    a, b = prepared(case, monkeypatch, criteria)

    def moments(seed, loss, part, half, rest):
        seen.append(texts(half))
        own = jax.tree.map(np.asarray, part["peft"])
        return gains.Moments(own, own, half.size)

    def gain(one, other, rate, seed):
        seen.append(rate(next(iter(tree.flatten(one.mean)))))
        return one.mean

    monkeypatch.setattr(criteria, "_moments", moments)
    criteria.by_moments(gain)(case, {"pfeiffer": CANDIDATES["pfeiffer"]})
    rate = configs.learning_rate(case.config) * configs.rates(case.config)["pfeiffer"]
    assert seen == [texts(a), texts(b), pytest.approx(rate)]
    assert rate != configs.learning_rate(case.config)


def test_the_factors_of_the_config_are_those_that_count(seed, monkeypatch):
    monkeypatch.setattr(criteria.measured, "information", lambda seed, name, loss, leaves, n, rest: leaves)
    found = []
    for factor in (1.0, 50.0):
        case = seed("thesis", factors={"lora": factor})
        scored = criteria.thesis(case, CANDIDATES).scores
        found.append(scored[0]["lora"])
    assert found[1] == pytest.approx(50 * found[0])


def test_a_budget_is_in_percent_of_the_model_and_of_what_trains_or_stays(seed):
    case = seed("size", budget="0.5%", budget_of="added")
    assert choose._limit(case) == pytest.approx(0.005 * tree.count(case.base.params))
    assert choose._cost(case, CANDIDATES["pfeiffer"]) == Cost(2 * 16 * 4 + 4 + 16)
    assert choose._cost(case, CANDIDATES["lora"]) == Cost(0)  # merges
    prefix = plans.Entry("prefix", {"num_virtual_tokens": 2, "mlp_hidden": 3})
    assert choose._cost(seed("size", budget="300"), prefix).shared > choose._cost(case, prefix).shared == 0


def test_a_race_of_rates_and_kinds_takes_a_tenth_of_the_passes(seed, monkeypatch):
    case = seed("race")
    case.config.train.num_epochs, asked = 100, []
    monkeypatch.setattr(trials.configs, "raced_rates", lambda config: (1, 4))

    def tried(seed, entry, params, train, held, every, *rest):
        asked.append(every)
        while True:
            yield Reached(0, np.full(11, 0.5))

    monkeypatch.setattr(trials, "tried", tried)
    monkeypatch.setattr(trials, "TELLING", 0)
    found = trials.race(case, CANDIDATES)
    total = 100 * 3
    assert sum(asked) <= 0.08 * total + 1
    assert found.passes <= 0.1 * total * 16


def test_the_rule_of_the_thesis_knows_modules_of_several_sizes(seed):
    case = seed("thesis", sizes=(1, 2))
    found = criteria.thesis(case, configs.candidates(case.config))
    assert found.about["factors"].items() >= {"lora": 1.0, "lora x2": 1.0, "pfeiffer": 5.0, "pfeiffer x2": 5.0}.items()
    assert all(row.keys() == found.about["factors"].keys() for row in found.scores.values())
