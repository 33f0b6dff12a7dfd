"""A search: its space, who runs which trial, what is left in the end, and what is refused."""

import json
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from jpeft import UserError
from jpeft import search as program
from jpeft.core import files
from jpeft.plans import plan as plans
from jpeft.plans.plan import Entry
from jpeft.report import front as fronts
from jpeft.report.front import Point
from jpeft.run.console import Console
from jpeft.workbench import best, locks, sampling, search, study, trials
from jpeft.workbench import space as spaces

# ml_collections loads the config file with it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
    pytest.mark.usefixtures("programs_stay"),
]
QUIET = Console(quiet=True)
LAYERS = 2  # of the tiny model
SPACE = {
    "serial": {"method": "pfeiffer", "option": "bottleneck", "sizes": (0, 1, 2, 4)},
    "flat": {"method": "prefix", "option": "num_virtual_tokens", "sizes": (0, 3), "options": {"mlp_hidden": None}},
}


def brute(points):
    """By definition: no other is as good in both and better in one."""

    def beats(a, b):
        return a.score >= b.score and a.percent <= b.percent and (a.score, a.percent) != (b.score, b.percent)

    return {p.number for p in points if not any(beats(other, p) for other in points)}


@pytest.mark.parametrize("values", [3, 5, 1000], ids=["many ties", "some ties", "none"])
def test_the_front_is_what_no_other_point_beats(values):
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        points = [Point(i, {}, *map(int, rng.integers(values, size=2)), 1.0) for i in range(n)]
        found = fronts.front(points)
        assert {point.number for point in found} == brute(points)
        assert [p.percent for p in found] == sorted(p.percent for p in found)
    assert fronts.front([]) == []


def test_a_point_is_a_plan():
    space = ConfigDict(SPACE)
    assert spaces.choices(space, "bits", LAYERS) == {"serial": 4, "flat": 2, "layer_0": 2, "layer_1": 2}
    both = [Entry("prefix", {"num_virtual_tokens": 3, "mlp_hidden": None}), Entry("pfeiffer", {"bottleneck": 2})]
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 1, "layer_0": 0, "layer_1": 1}) == {1: both}
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 0}) == {0: both[1:], 1: both[1:]}
    assert spaces.plan_of(space, LAYERS, {"serial": 0, "flat": 0, "layer_0": 1, "layer_1": 1}) == {}
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 1, "layer_0": 0, "layer_1": 0}) == {}


@pytest.mark.parametrize("layers", spaces.LAYERS)
@pytest.mark.parametrize("sizes", [(0, 1, 2, 4), (1, 2)])
def test_the_size_of_a_space_is_the_number_of_its_plans(layers, sizes):
    space = ConfigDict({**SPACE, "serial": {**SPACE["serial"], "sizes": sizes}})
    names = spaces.choices(space, layers, LAYERS)
    points = (dict(zip(names, point, strict=True)) for point in np.ndindex(*names.values()))
    found = {spaces.key(plan) for point in points if (plan := spaces.plan_of(space, LAYERS, point))}
    assert len(found) == spaces.size(space, layers, LAYERS)


def test_uniform_plans_of_one_candidate_come_first():
    space = ConfigDict(SPACE)
    first = [spaces.plan_of(space, LAYERS, point) for point in spaces.middles(space, "bits", LAYERS)]
    flat = Entry("prefix", {"num_virtual_tokens": 3, "mlp_hidden": None})
    assert first == [plans.uniform(flat, LAYERS), plans.uniform(Entry("pfeiffer", {"bottleneck": 2}), LAYERS)]
    space.flat.sizes = (3, 5)  # always there, so an adapter is never alone
    assert spaces.middles(space, "all", LAYERS) == [{"flat": 1, "serial": 0}]


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


@pytest.fixture
def opened(tmp_path):
    """Opens the same database again and again, as workers do."""

    def make(folder=tmp_path, of=None, first=(), startup=4, space=SPACE):
        space, of = ConfigDict(space), {"task": "mrpc"} if of is None else of
        names = spaces.choices(space, "bits", LAYERS)
        return study.begin(folder, of, names, lambda p: spaces.plan_of(space, LAYERS, p), first, startup, 0)

    return make


def test_a_trial_of_a_dead_worker_is_taken_up_and_one_of_a_living_worker_is_not(opened, claim):
    first, second = opened(), opened()
    dead, living = claim(first, 3), claim(first, 3)
    dead.lock.close()  # as the system does when a process ends
    again = claim(second, 3)
    assert (again.number, again.plan, again.again) == (dead.number, dead.plan, True)
    new = claim(second, 3)
    assert not new.again
    assert new.plan not in (dead.plan, living.plan)
    assert claim(second, 3) is None
    study.tell(second, again.number, 0.5, 0.1, 2.0)
    again.lock.close()
    assert claim(first, 3) is None
    assert len(study.counted(study.trials(first))) == 3


def test_points_whose_worker_died_as_it_drew_them_are_drawn_anew(opened, claim):
    own = opened()
    first = claim(own, 5)
    asks = sampling.distributions(own.choices)
    own.study.ask()  # no parameters yet
    for point in (dict.fromkeys(own.choices, 0), own.study.trials[first.number].params):  # no module; tried before
        own.study.enqueue_trial(point)
        own.study.ask(asks)
    new = claim(own, 5)
    assert not new.again
    assert new.plan not in ({}, first.plan)
    assert [each.plan for each in study.counted(study.trials(own))] == [first.plan, new.plan]


def test_workers_share_the_trials_until_every_plan_is_tried(opened, claim):
    workers = [opened(), opened()]
    wanted = spaces.size(ConfigDict(SPACE), "bits", LAYERS)
    claims = []
    while (one := claim(workers[len(claims) % 2], wanted)) is not None:
        claims.append(one)
        if len(claims) % 3:  # the others are still running
            study.tell(workers[(len(claims) - 1) % 2], one.number, 0.1 * len(claims), 1 / len(claims), 1.0)
    assert len({spaces.key(one.plan) for one in claims}) == len(claims) == wanted
    assert all(one.plan for one in claims)


def drawn(make, claim, folder, reopens):
    """The plans of twelve trials, scored by a formula; some workers die before they score."""
    found, own = [], make(folder)
    for i in range(12):
        one = claim(own, 12)
        one.lock.close()
        if i in reopens:
            own = make(folder)
            assert claim(own, 12)[:4] == (*one[:3], True)
        size = sum(entry.options.get("bottleneck", 3) for row in one.plan.values() for entry in row)
        study.tell(own, one.number, 1 - 1 / size, float(size), 1.0)
        found.append(one.plan)
    return found


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not(opened, claim, tmp_path):
    whole, stopped = (drawn(opened, claim, tmp_path / str(i), reopens) for i, reopens in enumerate([(), (0, 3, 7, 8)]))
    assert whole == stopped


def test_what_is_to_be_tried_first_is(opened, claim):
    first = spaces.middles(ConfigDict(SPACE), "bits", LAYERS)
    own = opened(first=first)
    assert [claim(own, 3).plan for _ in range(2)] == [own.plan_of(point) for point in first]
    assert claim(opened(first=first), 3).plan not in [own.plan_of(point) for point in first]


def test_a_database_of_another_search_is_refused(opened):
    opened(of={"task": "mrpc", "space": {"a": {"sizes": (0, 2)}}})
    opened(of={"task": "mrpc", "space": {"a": {"sizes": [0, 2]}}})
    message = r"of another search \(space.a.sizes was \[0, 2\], now \[0, 4\]\): choose another --workdir"
    with pytest.raises(UserError, match=message):
        opened(of={"task": "mrpc", "space": {"a": {"sizes": (0, 4)}}})
    with pytest.raises(UserError, match=r"task was 'mrpc', now 'not set'"):
        opened(of={"space": {"a": {"sizes": (0, 2)}}})


def test_a_damaged_database_is_one_line(opened, tmp_path):
    own = opened()
    path = tmp_path / study.JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"\n" + whole)
    with pytest.raises(UserError, match=r"is damaged .*: if its last line is cut short"):
        opened()
    with pytest.raises(UserError, match="is damaged"):
        study.trials(own)


@pytest.fixture
def config(tiny_config):
    tiny = tiny_config("head")
    config = search.default("mrpc", SPACE, trials=3)
    config.run.update(model=tiny.model, seeds=(1, 2))
    config.run.data.path = tiny.data.path
    config.run.train.update(num_epochs=2, max_length=8)
    return config


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
    ],
)  # fmt: skip
def test_searches_that_cannot_be(config, changes, says):
    with config.ignore_type(), config.unlocked():
        for name, value in changes.items():
            config[name] = ConfigDict(value) if isinstance(value, dict) else value
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


@pytest.fixture
def file(config, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        f"""
from jpeft.workbench import search
def get_config():
    config = search.default("mrpc", {SPACE}, trials=3)
    config.run.update(model={config.run.model!r}, seeds=(2,))
    config.run.data.path = {config.run.data.path!r}
    config.run.train.update(num_epochs=2, max_length=8)
    return config
"""
    )
    return path


def test_a_search_ends_on_its_report_and_trains_nothing_twice(file, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    argv = ["search", f"--config={file}", f"--workdir={work}"]
    real, left = trials.experiment.run, iter(range(2))

    def run(config, workdir, *rest):
        report = real(config, workdir, *rest)
        if next(left, None) is None:  # trained, and killed before it could say so
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(trials.experiment, "run", run)
    assert program.main(argv) == 130
    assert "**2 of 3 trials are finished.**" in (work / best.REPORT).read_text()
    monkeypatch.setattr(trials.experiment, "run", real)
    assert program.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count(", taken up again (2 of 3 done)") == 1

    record = files.read_record(work / best.TRIALS, best.KIND)
    assert len({json.dumps(row["plan"]) for row in record["trials"]}) == len(record["trials"]) == 3
    on_front = {row["number"] for row in record["trials"] if row["front"]}
    assert on_front == brute([Point(r["number"], {}, r["score"], r["percent"], 0) for r in record["trials"]])
    assert {int(number) for number in record["full"]} == on_front
    assert all(row["seeds"] == 1 for row in record["full"].values())
    assert {path.stem for path in (work / best.FRONT).glob("*.json")} == set(map(str, on_front))
    for row in record["trials"]:
        _check_sizes(work, row)
        if row["front"]:
            assert plans.read(str(work / best.FRONT / f"{row['number']}.json")) == plans.loads(json.dumps(row["plan"]))
    assert (work / best.PICTURE).read_bytes()[:4] == b"\x89PNG"
    page = (work / best.REPORT).read_text()
    assert "finished" not in page
    assert "--config.fishpal.plan=front/" in page

    before = files.read_record(work / best.TRIALS, best.KIND)
    monkeypatch.setattr(trials.experiment, "run", lambda *_: pytest.fail("it ran what is finished"))
    assert program.main(argv) == 0
    assert files.read_record(work / best.TRIALS, best.KIND) == before

    assert program.main([*argv, "--config.run.train.batch_size=8"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert "is of another search (run.train.batch_size was 'not set', now 8; search.train.batch_size was" in err


def _check_sizes(work, row):
    """Percentages count what the plan trains, by hand, and neither the head nor anything else."""
    d, count = 16, 0
    for entries in row["plan"].values():
        for entry in entries:
            options = entry["options"]
            b = options.get("bottleneck", 0)
            count += 2 * d * options["num_virtual_tokens"] if entry["method"] == "prefix" else 2 * d * b + b + d
    (report,) = (
        report
        for path in (work / "trials").glob("*/report.json")
        if spaces.key(plans.loads(json.dumps(row["plan"]))) == path.parent.name and (report := files.read_json(path))
    )
    sizes = report["parameters"]
    assert row["percent"] == pytest.approx(100 * count / (sizes["base"] + sizes["head"]))
    assert row["score"] == report["metrics"]["mean"][report["primary_metric"]]


def test_other_data_are_refused(config, tmp_path, tiny_glue):
    import shutil

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


def test_without_optuna_there_is_one_line(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # importing it fails
    assert program.main(["search", f"--config={file}", f"--workdir={tmp_path / 'work'}"]) == 2
    assert capsys.readouterr().err == "error: a search needs Optuna: pip install 'jpeft[search]'\n"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config.space.serial.sizes=(2, 1)", "config.space.serial.sizes must be whole numbers in rising order"),
        ("--config.trails=3", "config.trails is not a field of the config: did you mean 'config.trials'"),
        ("--cells=x", "unknown flag --cells"),
        ("--config.task=mrcp", "did you mean 'mrpc'"),
    ],
)
def test_a_mistake_is_one_line(file, tmp_path, capsys, given, message):
    assert program.main(["search", f"--config={file}", f"--workdir={tmp_path / 'work'}", given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as exited:
        program.main(["search", "--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    for part in ("python -m jpeft.search --config", "--workdir", "num_virtual_tokens", "warm_start: true"):
        assert part in out
