"""Training one seed: what is logged, saved and timed, and that a run that was killed ends as one that was not."""

import itertools
import json
import signal

import chex
import jax
import numpy as np
import pytest
from training.test_loop import DATA, METHOD, MODEL, divided

import jpeft
from jpeft.core.errors import UserError
from jpeft.run import config as configs
from jpeft.run import experiment, loading, log
from jpeft.run import train as running
from jpeft.run.clock import Clock
from jpeft.run.console import Console
from jpeft.run.seed import Seed
from jpeft.run.stopping import Stopped
from jpeft.run.train import Ready
from jpeft.training import checkpoint
from jpeft.training.compiled import Steps

CONFIG = running.configs.default("mrpc", "lora")
CONFIG.update(
    {
        "seeds": (1, 5),
        "train": {"num_epochs": 3, "batch_size": 8, "warmup_ratio": 0.1, "learning_rate": 1e-2},
    }
)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def compiled():
    """The programs of the first run, for all of them."""
    kept = []

    def make(*fns):
        if not kept:
            kept.append(Steps(*(jax.jit(fn) for fn in fns)))
        return kept[0]

    return make


@pytest.fixture
def start(monkeypatch, compiled):
    """Starts a run in a folder, or resumes it; the training step dies after so many calls."""

    def call(folder, dies_after=None, dies_evaluating=False, asked_after=None):
        def steps(*fns_and_mesh):
            train, evaluate, _ = compiled(*fns_and_mesh[:2])
            left = iter(range(10**9 if dies_after is None else dies_after))
            calls = itertools.count(1)

            def step(*args):
                if next(calls) == asked_after:
                    signal.raise_signal(signal.SIGTERM)
                if next(left, None) is None:
                    raise Killed
                return train(*args)

            def dying(*args):
                raise Killed

            return Steps(step, dying if dies_evaluating else evaluate)

        monkeypatch.setattr(Steps, "compiled", steps)
        folder.mkdir(exist_ok=True)
        sites, parts = divided()
        clock, key = Clock({"fisher": 0.0}), jax.random.key(3)
        seed = Seed(CONFIG, 5, DATA, None, MODEL, sites, key, key, folder, Console(quiet=True), clock)
        (last,) = running.train([Ready(seed, [], METHOD, parts, None, {}, [])])
        return last, clock.seconds

    return call


@pytest.fixture
def whole(start, tmp_path):
    return start(tmp_path / "whole")[0]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same(last, whole):
    chex.assert_trees_all_equal(last.state, whole.state)
    assert last.history == whole.history


@pytest.mark.parametrize("calls", [6, 11])
def test_killed_twice_between_checkpoints_it_ends_the_same(tmp_path, start, whole, calls):
    for dies_after in (calls, 2):
        with pytest.raises(Killed):
            start(tmp_path / "killed", dies_after)
    check_same(start(tmp_path / "killed")[0], whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize("calls", [1, 4, 6])
def test_resumed_in_the_middle_of_an_epoch_it_ends_the_same(tmp_path, start, whole, calls, monkeypatch):
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(running, "EVENT_SECONDS", 0.0)  # after every step
    with pytest.raises(Killed):
        start(tmp_path / "killed", calls)
    restored = checkpoint.restore(tmp_path / "killed" / "seed_5" / "checkpoints", whole.state)
    assert restored is not None
    assert int(restored.state.step) == calls
    check_same(start(tmp_path / "killed")[0], whole)


def test_a_machine_that_pads_otherwise_does_not_resume(tmp_path, start, monkeypatch):
    """Other rows meet in its batches: some of the epoch would be seen twice, and others not at all."""
    with pytest.raises(Killed):
        start(tmp_path, dies_after=6)
    monkeypatch.setattr(running, "_layouts", lambda seed: [[[4, 64]]])
    with pytest.raises(UserError, match="batches are padded to other lengths"):
        start(tmp_path)


@pytest.mark.parametrize("calls", [2, 4, 12])
def test_a_run_that_is_asked_to_stop_saves_and_ends_the_same(tmp_path, start, whole, calls, monkeypatch):
    """In the middle of an epoch at once; after its last step, once the epoch is evaluated."""
    monkeypatch.setattr(running, "EVENT_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"stopped and saved at step {calls} of 12"):
        start(tmp_path / "stopped", asked_after=calls)
    assert signal.getsignal(signal.SIGTERM) == before
    restored = checkpoint.restore(tmp_path / "stopped" / "seed_5" / "checkpoints", whole.state)
    assert restored is not None
    assert int(restored.state.step) == calls
    check_same(start(tmp_path / "stopped")[0], whole)
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_killed_while_it_evaluates_it_ends_the_same(tmp_path, start, whole, monkeypatch):
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(Killed):
        start(tmp_path / "killed", dies_evaluating=True)
    check_same(start(tmp_path / "killed")[0], whole)


def test_a_finished_run_trains_no_more(tmp_path, start, whole):
    """It evaluates once more, since logits are not in checkpoints."""
    again = start(tmp_path / "whole", dies_after=0)[0]
    check_same(again, whole)
    chex.assert_trees_all_equal(again.logits, whole.logits)


def test_seconds_add_up_over_starts(tmp_path, start):
    with pytest.raises(Killed):
        start(tmp_path, 6)
    _, seconds = start(tmp_path)
    restored = checkpoint.restore(tmp_path / "seed_5" / "checkpoints", start(tmp_path)[0].state)
    assert restored is not None
    assert set(seconds) == {"fisher", "compile", "train", "evaluate"}
    assert seconds["train"] >= restored.progress.seconds["train"] > 0


@pytest.fixture
def falling(monkeypatch):
    """A task whose first epoch is the best."""
    scores = iter([0.9, 0.5, 0.7] * 9)
    # NumPy's numbers, as a score of the user's own may give: files cannot hold them.
    monkeypatch.setattr(type(DATA.task), "score", lambda *_: {"accuracy": np.float32(next(scores)), "f1": np.float32()})


def test_the_best_epoch_is_given_back_if_the_config_says_so(tmp_path, start, whole, falling, monkeypatch):
    config = CONFIG.copy_and_resolve_references()
    config.train.export = "best"
    monkeypatch.setattr(running, "EVENT_SECONDS", 0.0)
    monkeypatch.setitem(globals(), "CONFIG", config)
    with pytest.raises(Killed):
        start(tmp_path / "killed", 4)  # the first epoch has four steps
    first = checkpoint.restore(tmp_path / "killed" / "seed_5" / "checkpoints", whole.state)
    assert first is not None
    last, _ = start(tmp_path / "killed")
    chex.assert_trees_all_equal(last.state.trainable, first.state.trainable)
    assert [row["accuracy"] for row in last.history] == pytest.approx([0.9, 0.5, 0.7])
    assert np.abs(last.logits - whole.logits).max() > 1e-4


def test_another_epoch_does_not_pass_for_the_best(tmp_path, start, falling, monkeypatch):
    """As a run that was killed between may have it, if its last epoch ended in another score when it was repeated."""
    config = CONFIG.copy_and_resolve_references()
    config.train.export = "best"
    monkeypatch.setitem(globals(), "CONFIG", config)
    written = running.files.write_leaves
    monkeypatch.setattr(
        running.files, "write_leaves", lambda path, leaves, about: written(path, leaves, {"epoch": "2"})
    )
    with pytest.raises(UserError, match=r"is of epoch 2, but the best one is 1: set train\.export=last"):
        start(tmp_path)


def test_tensorboard_gets_the_same_numbers(tmp_path, start, monkeypatch):
    config = CONFIG.copy_and_resolve_references()
    config.train.tensorboard = True
    monkeypatch.setitem(globals(), "CONFIG", config)
    start(tmp_path)
    assert list((tmp_path / "seed_5" / "tensorboard").glob("events.*"))


def test_steps_are_logged(tmp_path, start, monkeypatch):
    monkeypatch.setattr(log, "LOG_EVERY", 2)
    start(tmp_path)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert list(found[0]) == ["seed", "epoch", "step", "loss", "grad_norm"]
    assert found[0]["grad_norm"] > 0


def ready(seed, shape, rank=2):
    parts = jpeft.Partition({"x": np.zeros(shape)}, {"params": {}}, {}, {})
    return Ready(seed, [{"method": "lora", "options": {"rank": rank}}], METHOD, parts, None, {}, [])


def test_neighbours_of_one_shape_train_together():
    seeds = [ready(1, 2), ready(2, 2), ready(3, 2), ready(4, 3), ready(5, 3), ready(6, 3, rank=1), ready(7, 2)]
    found = [[each.seed for each in group] for group in running.groups(iter(seeds), 2)]
    assert found == [[1, 2], [3], [4, 5], [6], [7]]
    first = next(running.groups(iter(seeds), 1))
    assert [each.seed for each in first] == [1]
    faster = [ready(1, 2), ready(2, 2)._replace(rate=4.0), ready(3, 2)._replace(rate=4.0)]
    assert [[each.seed for each in group] for group in running.groups(iter(faster), 3)] == [[1], [2, 3]]


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("dora", "float32")])
def test_the_base_is_stored_as_it_is_computed_with(method, dtype, tiny_config):
    class Seed:
        config = tiny_config("lora", dtype="bfloat16")

    base = {"encoder": {"kernel": np.zeros((2, 2), np.float32), "LayerNorm": {"scale": np.ones(2, np.float32)}}}
    parts = jpeft.Partition({}, {"params": base, "peft": {}}, {}, {})
    chain = jpeft.chain(jpeft.houlsby(), getattr(jpeft, method)())
    stored = running._stored(Ready(Seed, [], chain, parts, None, {}, []))["params"]["encoder"]
    assert stored["kernel"].dtype == dtype
    assert stored["LayerNorm"]["scale"].dtype == "float32"


def test_a_seed_trains_at_the_rate_that_was_chosen_for_it(monkeypatch, tiny_config):
    asked = []
    monkeypatch.setattr(running.optim, "warmup_linear", lambda rate, *rest: asked.append(rate))
    monkeypatch.setattr(running.optim, "adamw", lambda *args: None)
    monkeypatch.setattr(running, "_schedule", lambda seed: running.Schedule(1, 1, None))
    monkeypatch.setattr(running.Schedule, "num_steps", lambda self, data: 10)

    class Seed:
        config, data = tiny_config("fishpal"), None

    running._optimizer(ready(Seed, 2)._replace(rate=4.0))
    assert asked == [4 * running.configs.learning_rate(Seed.config)]


def test_a_group_that_is_full_does_not_wait_for_the_next_seed():
    seen = []
    ones = (seen.append(i) or ready(i, 2) for i in range(5))
    next(running.groups(ones, 2))
    assert seen == [0, 1]


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (1200, True), (1000, False)])
def test_seeds_train_together_where_the_memory_allows(monkeypatch, limit, fits):
    class Device:
        def memory_stats(self):
            return None if limit is None else {"bytes_limit": limit}

    monkeypatch.setattr(running.jax, "local_devices", lambda: [Device()])
    seeds = [Seed(None, i, None, None, None, None, None, None, None, Console(quiet=True), None) for i in (1, 2)]
    assert running._fits(seeds, 1000) == fits


def test_a_seed_trains_by_the_recipe_of_its_config_and_the_parts_of_its_method(monkeypatch, tiny_config):
    asked = []
    monkeypatch.setattr(running.optim, "warmup_linear", lambda *args: asked.append(args))
    monkeypatch.setattr(running.optim, "adamw", lambda *args: asked.append(args))
    monkeypatch.setattr(running, "_schedule", lambda seed: running.Schedule(1, 1, None))
    monkeypatch.setattr(running.Schedule, "num_steps", lambda self, data: 10)

    class Seed:
        config, data = tiny_config("fishpal", warmup_ratio=0.25, weight_decay=0.375), None

    own = ready(Seed, 2)._replace(rate=4.0)
    running._optimizer(own)
    (rate, *rest), (_, decay, parts) = asked
    assert (rate, rest, decay) == (4 * running.configs.learning_rate(Seed.config), [10, 0.25], 0.375)
    assert parts is own.parts


def test_each_kind_of_a_plan_trains_at_its_own_rate(tiny_config, tmp_path):
    entries = {"lora": {"rank": 2}, "prefix": {"num_virtual_tokens": 2, "mlp_hidden": 3}}
    plan = {str(i): [{"method": name, "options": entries[name]}] for i, name in enumerate(entries)}
    config, console = tiny_config("fishpal", max_length=8), Console(quiet=True)
    config.fishpal.update(criterion="race", num_examples=None, plan=json.dumps(plan), learning_rates={"prefix": 1e-2})
    data, base, _ = loading.load(config, console)
    found = experiment._prepare(config, 11, data, base, tmp_path, console)
    rates = {name: set(jax.tree.leaves(own)) for name, own in found.parts.rates["peft"].items()}
    wanted = configs.rates(config)
    assert rates == {f"{name}_0": {wanted[name]} for name in entries}
    assert wanted["prefix"] == pytest.approx(1e-2 / configs.learning_rate(config)) != wanted["lora"]
