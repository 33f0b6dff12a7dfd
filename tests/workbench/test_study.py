"""Who runs which trial of a search, and what the database of it refuses."""

import pytest
from ml_collections import ConfigDict
from workbench.spaces import LAYERS, SPACE

from jpeft import UserError
from jpeft.workbench import sampling, study
from jpeft.workbench import space as spaces


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
