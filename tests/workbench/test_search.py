"""A search: its config, its trials, and the full runs of what it found."""

import functools
import shutil

import pytest
from ml_collections import ConfigDict
from workbench.spaces import SPACE

from jpeft import UserError
from jpeft.plans.plan import Entry
from jpeft.run.console import Console
from jpeft.workbench import best, locks, search, study, trials

pytestmark = pytest.mark.usefixtures("programs_stay")
QUIET = Console(quiet=True)


@pytest.fixture
def config(tiny_config):
    tiny = tiny_config("head")
    config = search.default("mrpc", SPACE, trials=3)
    config.run.update(model=tiny.model, seeds=(1, 2))
    config.run.data.path = tiny.data.path
    config.run.train.update(num_epochs=2, max_length=8)
    return config


@pytest.fixture
def claim():
    """`study.claim`, whose locks are closed in the end."""
    made = []

    def make(own, wanted):
        found = study.claim(own, wanted)
        made.extend([found] if found else [])
        return found

    yield make
    for found in made:
        found.lock.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 0}, "config.trials must be a whole number of at least 1, got 0"),
        ({"trials": True}, "config.trials must be a whole number"),
        ({"seed": -1}, "config.seed must be a whole number of at least 0, got -1"),
        ({"layers": "bit"}, "config.layers 'bit' is unknown: did you mean 'bits'"),
        ({"warm_start": 1}, "config.warm_start must be True or False, got 1"),
        ({"run": None}, "config.run must be a dict"),
        ({"search": {"task": "cola"}}, "config.search sets task, which is for the whole search"),
        ({"search": {"trian": {"num_epochs": 1}}}, r"config.search: 'trian.num_epochs' is not a field of a run"),
        ({"search": {"train": {"num_epochs": 0}}}, r"a trial: config.train.num_epochs must be from 1"),
        ({"search": {"train": {"export": "best"}}}, "a trial: train.export is 'best', but what is"),
        ({"space": {}}, "config.space must be"),
        ({"space": {"a": 5}}, "config.space.a must be a dict of method, option, sizes, options, got 5"),
        ({"space": {"layer_1": SPACE["flat"]}}, "'layer_1' cannot be the name of a candidate"),
        ({"space": {"a": {**SPACE["serial"], "size": 3}}}, "config.space.a has no field 'size': did you mean 'sizes'"),
        ({"space": {"a": {"method": "lora", "sizes": (1,)}}}, "config.space.a lacks 'option'"),
        ({"space": {"a": {**SPACE["serial"], "sizes": (0,)}}}, "config.space.a.sizes must be whole numbers in"),
        ({"space": {"a": {**SPACE["serial"], "sizes": (4, 2)}}}, "config.space.a.sizes must be whole numbers in"),
        ({"space": {"a": {**SPACE["serial"], "method": "lroa"}}}, "config.space.a: .*did you mean 'lora'"),
        ({"space": {"a": {**SPACE["serial"], "method": "full"}}}, "config.space.a: method 'full' is not a module"),
        ({"space": {"a": {**SPACE["serial"], "option": "rank"}}}, "config.space.a: pfeiffer has no option 'rank'"),
        ({"space": {"a": {**SPACE["serial"], "options": {"layers": (1,)}}}}, "drop the option 'layers'"),
        ({"run.fishpal.plan": "thesis_mrpc"}, "config.run.fishpal.plan is set, but the space says what to choose from"),
        ({"run.fishpal.learning_rates.lora": 1e-2}, "config.run.fishpal.learning_rates.lora is set, but the space"),
    ],
)  # fmt: skip
def test_searches_that_cannot_be(config, changes, says):
    with config.ignore_type(), config.unlocked():
        for path, value in changes.items():
            *sections, name = path.split(".")
            section = functools.reduce(getattr, sections, config)
            section[name] = ConfigDict(value) if isinstance(value, dict) else value
    with pytest.raises(UserError, match=says):
        search.check(config)


def test_rates_are_for_the_plans_that_have_the_module(config):
    config.run.fishpal.learning_rates.prefix = 1e-2
    search.check(config)
    with_it, without = ({0: [Entry(name)]} for name in ("prefix", "pfeiffer"))
    assert search.config_of(config, with_it, short=True).fishpal.learning_rates.prefix == 1e-2
    assert search.config_of(config, without, short=True).fishpal.learning_rates.prefix is None


def test_the_short_recipe_is_the_full_one_but_for_what_it_sets(config):
    short, full = (search.config_of(config, {0: [Entry("pfeiffer")]}, short) for short in (True, False))
    assert (short.train.num_epochs, short.seeds) == (1, (1,))
    assert (full.train.num_epochs, full.seeds) == (2, (1, 2))
    assert short.train.max_length == full.train.max_length == 8
    config.run.train.max_train_examples = 30
    both = [search.config_of(config, {0: [Entry("pfeiffer")]}, short) for short in (True, False)]
    assert [each.train.max_train_examples for each in both] == [30, 30]
    config.search.train.update(max_train_examples=20, learning_rate=1e-2)
    both = [search.config_of(config, {0: [Entry("pfeiffer")]}, short) for short in (True, False)]
    assert [(each.train.max_train_examples, each.train.learning_rate) for each in both] == [(20, 1e-2), (30, None)]


def test_other_data_are_refused(config, tmp_path, tiny_glue):
    shutil.copytree(tiny_glue, tmp_path / "glue")
    config.run.data.path = str(tmp_path / "glue")
    trials.begin(config, tmp_path / "work", QUIET)
    path = tmp_path / "glue/mrpc/train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="the training data: 45 rows, now 44"):
        trials.begin(config, tmp_path / "work", QUIET)


def test_a_training_that_does_not_stay_finite_is_noted_and_the_search_goes_on(config, tmp_path, monkeypatch):
    begun = trials.begin(config, tmp_path, QUIET)
    monkeypatch.setattr(trials, "points", lambda _: [])
    report = {
        "parameters": {"trainable": 40, "base": 90, "head": 10}, "metrics": {"mean": {"accuracy": 0.5, "f1": 0.5}},
        "seconds": {"train": 1.0},
    }  # fmt: skip
    answers = iter([UserError("the loss is not finite after step 3"), report, UserError("the disk is full")])

    def run(*_):
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return report

    monkeypatch.setattr(trials.experiment, "run", run)
    with pytest.raises(UserError, match="the disk is full"):
        list(trials.run_all(begun))
    assert [each.state for each in study.counted(study.trials(begun.study))] == ["fail", "complete", "running"]
    assert "In these trials training did not stay finite: 0." in best.write(begun)


def test_a_worker_waits_for_the_trials_of_another(config, claim, tmp_path, monkeypatch):
    begun, other = (trials.begin(config, tmp_path, QUIET) for _ in range(2))
    claims = [claim(other.study, 3) for _ in range(3)]
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        study.tell(other.study, claims[len(slept) - 1].number, 0.5, 0.1, 1.0)

    monkeypatch.setattr(trials.time, "sleep", sleep)
    assert list(trials.run_all(begun)) == []
    assert slept == [trials.POLL] * 3


def test_a_full_run_of_another_worker_is_left_to_it(config, claim, tmp_path):
    begun = trials.begin(config, tmp_path, QUIET)
    one = claim(begun.study, 1)
    study.tell(begun.study, one.number, 0.5, 0.1, 1.0)
    with locks.hold(tmp_path / "full" / str(one.number)):
        assert list(best.train(begun)) == []
