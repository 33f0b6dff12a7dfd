"""What a criterion predicts, held against trained scores, on numbers where the answer is known."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from jpeft.plans import plan as plans
from jpeft.plans.plan import Entry
from jpeft.run import command
from jpeft.run import config as configs
from jpeft.run.console import Console
from jpeft.workbench import compare, regret

KINDS = {"good": Entry("lora", {"rank": 2}), "bad": Entry("lora", {"rank": 1})}
POOL = {
    "-".join(names): {layer: [KINDS[name]] for layer, name in enumerate(names)}
    for names in itertools.product(KINDS, repeat=3)
}
WORTH = {"good": 0.02, "bad": 0.01}
TRAINED = {
    seed: {name: 0.7 + sum(WORTH[kind] * (layer + 1) for layer, kind in enumerate(name.split("-"))) for name in POOL}
    for seed in (1, 2)
}


def scores(sign=1.0):
    """What a criterion found, as its file has it."""
    table = {f"{i}": {regret._name(KINDS[k]): sign * v * (i + 1) for k, v in WORTH.items()} for i in range(3)}
    return {"scores": table, "passes": 9.0}


def test_a_criterion_that_is_right_has_no_regret():
    found = regret.verdict({1: scores(), 2: scores()}, TRAINED, POOL)
    assert found.tau == pytest.approx(1.0)
    assert found.regret == pytest.approx(0.0)
    assert found.against_uniform == pytest.approx(0.0)  # the best plan is a uniform one here
    assert found.pick == POOL["good-good-good"]
    assert found.passes == 9


def test_a_prediction_of_whole_plans_counts_and_not_the_sum_of_scores():
    plans = {name: -predicted for name, predicted in TRAINED[1].items()}
    found = regret.verdict({1: {**scores(), "plans": plans}}, TRAINED, POOL)
    assert found.tau == pytest.approx(-1.0)
    assert found.pick == POOL["good-good-good"]  # of each layer by itself


def test_a_criterion_that_is_wrong_pays_for_it():
    found = regret.verdict({1: scores(-1), 2: scores(-1)}, TRAINED, POOL)
    assert found.tau == pytest.approx(-1.0)
    assert found.regret == pytest.approx(0.06)
    assert found.against_uniform == pytest.approx(-0.06)


def test_a_tie_goes_to_the_plan_that_is_listed_first():
    pool = {f"all {rank}": {layer: [Entry("lora", {"rank": rank})] for layer in range(2)} for rank in range(9, 0, -1)}
    even = {str(layer): {regret._name(plan[layer][0]): 1.0 for plan in pool.values()} for layer in range(2)}
    trained = {1: dict.fromkeys(pool, 0.5)}
    assert regret.verdict({1: {"scores": even, "passes": 0}}, trained, pool).pick == pool["all 9"]


def test_the_interval_is_of_the_difference_on_rows_and_seeds_drawn_anew():
    wrong = {seed: scores(-1) for seed in (1, 2)}  # its favourite is "bad-bad-bad", the best one "good-good-good"
    noise = np.random.default_rng(0).normal(size=(2, 400)) / 100
    drawn = {
        seed: {name: score + (noise[seed - 1] if name == "bad-bad-bad" else 0.0) for name, score in row.items()}
        for seed, row in TRAINED.items()
    }
    found = regret.verdict(wrong, TRAINED, POOL, drawn)
    low, high = found.regret_interval
    # The mean of two such normal draws, or twice one of them: a variance of 3/4 of one draw's.
    assert (low, high) == pytest.approx((0.06 - 1.96 * 0.0087, 0.06 + 1.96 * 0.0087), abs=0.003)
    assert found.uniform_interval == pytest.approx((-high, -low))
    assert np.isnan(regret.verdict(wrong, TRAINED, POOL).regret_interval).all()


def test_headroom_is_not_flattered_by_the_noise_that_chose_the_plan():
    uniform = ["good-good-good", "bad-bad-bad"]
    lucky = {seed: dict(row) for seed, row in TRAINED.items()}
    lucky[1]["bad-good-bad"] = 0.99  # on one seed only
    assert regret.headroom(TRAINED, uniform) == pytest.approx(0.0)
    gap = TRAINED[2]["bad-good-bad"] - TRAINED[2]["good-good-good"]
    assert regret.headroom(lucky, uniform) == pytest.approx((gap + 0.0) / 2)


def test_each_kind_is_measured_at_the_rate_at_which_its_plans_train():
    def fields(kind, **rates):
        return {"method": "fishpal", "fishpal": {"plan": plans.dumps({0: [Entry(kind, {})]}), "learning_rates": rates}}

    grid = compare.default({"a": fields("lora"), "b": fields("prefix", prefix=1e-4)}, ("mrpc",), (1,))
    grid.run.train.learning_rate = 2e-3
    found = configs.rates(regret.config_of(grid, "mrpc", 1))
    assert found["prefix"] == pytest.approx(1e-4 / 2e-3)
    assert found["lora"] == pytest.approx(1.0)


def test_the_rule_of_the_thesis_is_measured_on_rows_of_all_lengths(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where it keeps what a choice keeps in a run's folder
    pool = {"one": {0: [Entry("lora", {"rank": 2})], 1: [Entry("pfeiffer", {"bottleneck": 4})]}}
    config = tiny_config("fishpal")
    found = regret.measure(config, 1, "thesis", pool, Console(quiet=True))
    assert found["scores"].keys() == {0, 1}
    for scores in found["scores"].values():
        assert scores.keys() == {'lora {"rank": 2}', 'pfeiffer {"bottleneck": 4}'}
        assert all(score > 0 for score in scores.values())


GRID = """
import json
from jpeft.workbench import compare
def get_config():
    pool = {"all 1": 1, "all 2": 2}
    entry = lambda rank: [{"method": "lora", "options": {"rank": rank}}]
    plan = lambda rank: json.dumps({layer: entry(rank) for layer in range(2)})
    variants = {name: {"method": "fishpal", "fishpal": {"plan": plan(rank)}} for name, rank in pool.items()}
    return compare.default(variants, tasks=("mrpc",), seeds=(1, 2))
"""


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of how absl reads configs
def test_the_program_measures_once_and_prints_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.py").write_text(GRID)
    asked = []

    def measure(config, seed, criterion, pool, console):
        asked.append((criterion, config.task, seed))
        scores = {str(i): {regret._name(row[0]): row[0].options["rank"] for row in ([e] for p in pool.values()
                           for e in p[i])} for i in range(2)}  # fmt: skip
        return {"criterion": criterion, "seed": seed, "passes": 7, "scores": scores}

    outcomes = [
        SimpleNamespace(task=SimpleNamespace(name="mrpc"), seed=seed, variant=f"all {rank}", score=lambda r=rank: r / 4)
        for seed in (1, 2)
        for rank in (1, 2)
    ]
    monkeypatch.setattr(regret, "measure", measure)
    monkeypatch.setattr(regret.findings, "outcomes", lambda grid, folder: outcomes)
    monkeypatch.setattr(regret, "resampled", lambda outcome, draws: outcome.score() + np.linspace(-0.1, 0.1, draws))
    call = ["regret", f"--config={tmp_path / 'grid.py'}", f"--cells={tmp_path}", "--criteria=size,size@cola"]
    for _ in range(2):
        assert command.call(regret.run, call) == 0
    assert asked == [("size", "mrpc", 1), ("size", "mrpc", 2), ("size", "cola", 1), ("size", "cola", 2)]
    printed = capsys.readouterr().out
    assert "| size | +1.00 | +0.00 (+0.0 to +0.0) | +0.00 (+0.0 to +0.0) | 7 | 0-1 lora(rank=2) |" in printed
    assert "| size@cola | +1.00 |" in printed
    (tmp_path / "other.py").write_text(GRID.replace('"all 2": 2', '"all 2": 3'))  # another plan of that name
    assert command.call(regret.run, [*call[:1], f"--config={tmp_path / 'other.py'}", *call[2:]]) == 2
    assert "or of other plans: remove it" in capsys.readouterr().err
    path = tmp_path / "scores" / "mrpc-size-1.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"of": found["of"] | {"train.num_epochs": 7}}))
    assert command.call(regret.run, call) == 2
    assert (
        "mrpc-size-1.json was measured by another config or version, or of other plans: remove it"
        in capsys.readouterr().err
    )
    assert command.call(regret.run, [*call[:-1], "--criteria=sise"]) == 2
    assert "the criterion 'sise' is unknown: did you mean 'size' or" in capsys.readouterr().err


def test_a_favourite_is_judged_on_another_seed_than_it_was_measured_and_than_chose_the_best():
    """By hand: three seeds that disagree on which plan is best."""
    pool = {name: {0: [KINDS[kind]]} for name, kind in (("a", "good"), ("b", "bad"))}
    trained = {1: {"a": 0.9, "b": 0.5}, 2: {"a": 0.6, "b": 0.95}, 3: {"a": 0.6, "b": 0.8}}
    found = {1: {"scores": {"0": {regret._name(KINDS["good"]): 2.0, regret._name(KINDS["bad"]): 1.0}}, "passes": 0}}
    told = regret.verdict(found, trained, pool)
    # Its favourite is "a". On seed 2 the best of seeds 1 and 3 is "a", 0.75 to 0.65; on seed 3, of 1 and 2, too.
    assert told.regret == pytest.approx(0.0)
    assert told.tau == pytest.approx(-1.0)  # of seeds 2 and 3; on seed 1, which was measured, it would be right
    assert regret._ceiling(trained, ["a", "b"]) == pytest.approx((-1 - 1 + 1) / 3)


def test_a_uniform_plan_has_its_module_in_as_many_layers_as_any():
    pool = {"all": {0: [KINDS["bad"]], 1: [KINDS["bad"]]}, "half": {1: [KINDS["good"]]}}
    assert regret.uniform_of(pool, list(pool)) == ["all"]


def test_the_interval_is_over_the_seeds_that_judge():
    """The pairs of one judge with several measured seeds say one thing, and not several."""
    rng = np.random.default_rng(0)
    seeds = range(4)
    trained = {seed: {name: 0.7 + 0.02 * rng.standard_normal() for name in POOL} for seed in seeds}
    drawn = {seed: {name: np.full(4000, score) for name, score in row.items()} for seed, row in trained.items()}
    found = regret.verdict({seed: scores() for seed in seeds}, trained, POOL, drawn)
    gaps = []
    for judge in seeds:  # all measured seeds have one favourite
        others = [trained[s] for s in seeds if s != judge]
        best = max(POOL, key=lambda name: np.mean([row[name] for row in others]))
        gaps.append(trained[judge][best] - trained[judge]["good-good-good"])
    exact = np.quantile([np.mean(x) for x in itertools.product(gaps, repeat=4)], (0.025, 0.975))
    assert found.regret == pytest.approx(np.mean(gaps))
    assert found.regret_interval == pytest.approx(exact, abs=0.15 * np.std(gaps))
