import functools

import chex
import jax
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.data.padding import Part
from jpeft.data.task import Data
from jpeft.data.tasks import TASKS
from jpeft.models import Bert, BertConfig
from jpeft.training import compiled, loop, optim
from jpeft.training import step as stepping
from jpeft.training.compiled import Compiled, Steps
from jpeft.training.loop import Schedule

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_labels": 2,
}  # fmt: skip
METHOD = jpeft.chain(jpeft.lora(rank=2))
SCHEDULE = Schedule(num_epochs=3, seed=5, key=jax.random.key(2))
MODEL = Bert(BertConfig(**SHAPE))
OPTIMIZER = optim.adamw(optax.constant_schedule(1e-2), 0.1)


def examples(size=28, seed=0):
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(1, 20, n, dtype=np.int32) for n in rng.integers(4, 17, size))
    return Examples(rows, tuple(map(np.zeros_like, rows)), rng.integers(0, 2, size, dtype=np.int32))


DATA = Data(TASKS["mrpc"], examples(), examples(10, seed=1), ((Part(4, 10), Part(4, 16)), (Part(8, 16),)), (8, 16))


@pytest.fixture(scope="module")
def steps():
    """Without giving up the state's buffers: the tests look at what went before."""
    train, evaluate = stepping.train_step(MODEL, METHOD, OPTIMIZER), stepping.eval_step(MODEL, METHOD)
    return Steps(Compiled(train, 2), Compiled(evaluate, 2))


INIT = jax.jit(MODEL.init)


@functools.cache
def divided():
    """The sites of the model, and what of it trains and what is frozen."""
    x = jax.numpy.ones((1, 8), int)
    params, sites = INIT(jax.random.key(0), x)["params"], jpeft.sites(MODEL, x)
    leaves = jpeft.init(METHOD, jax.random.key(1), sites, params)
    return sites, jpeft.partition(METHOD, params, leaves, trains="classifier")


def started():
    """The state before the first step, and what is frozen."""
    _, parts = divided()
    return stepping.init_state(parts.trainable, OPTIMIZER), parts.frozen


@pytest.fixture(scope="module")
def start():
    return started()


@pytest.fixture(scope="module")
def events(steps, start):
    return list(loop.fit(steps, *start, DATA, SCHEDULE, every=0))


def test_an_event_for_every_step_and_every_epoch(events):
    assert [(event.epoch, event.step, event.row is not None) for event in events[:6]] == [
        (1, 1, False), (1, 2, False), (1, 3, False), (1, 4, False), (1, 4, True), (2, 5, False),
    ]  # fmt: skip
    last = events[-1]
    assert len(events) == 15
    assert [(row["epoch"], row["step"]) for row in last.history] == [(1, 4), (2, 8), (3, 12)]
    assert all(list(row) == ["epoch", "step", "train_loss", "accuracy", "f1"] for row in last.history)
    assert int(last.state.step) == SCHEDULE.num_steps(DATA) == 12
    assert last.row == last.history[-1]
    assert last.history[-1]["train_loss"] < last.history[0]["train_loss"]
    assert events[3].loss_sum == pytest.approx(sum(loss for event in events[:4] for loss in event.losses))
    assert events[4].row["train_loss"] == pytest.approx(events[3].loss_sum / 4)
    assert all(len(event.losses) == len(event.grad_norms) == (event.row is None) for event in events)
    assert all(norm > 0 for event in events for norm in event.grad_norms)
    for event in events:
        assert (event.logits is None) == (event.row is None)
        if event.row is not None:
            assert DATA.task.score(event.logits, DATA.dev.labels)["accuracy"] == event.row["accuracy"]


@pytest.mark.parametrize("at", [0, 2, 3, 4, 8, 12])
def test_resumed_from_any_event_it_ends_the_same(steps, start, events, at):
    taken = events[at]
    rest = list(loop.fit(steps, taken.state, start[1], DATA, SCHEDULE, taken.history, taken.loss_sum, 0))
    # After the last step of an epoch, its evaluation was not reached: a checkpoint is only taken behind it.
    if taken.row is None and taken.step % 4 == 0:
        assert rest[0].epoch == taken.epoch + 1
        return
    chex.assert_trees_all_equal(rest[-1].state, events[-1].state)
    assert rest[-1].history == events[-1].history
    assert len(rest) == len(events) - at - 1


def test_the_numbers_do_not_depend_on_when_events_come(steps, start, events):
    """Seen once an epoch only, the steps are the same, and so is every loss."""
    seldom = list(loop.fit(steps, *start, DATA, SCHEDULE, every=1e9))
    assert [(event.epoch, event.step, len(event.losses)) for event in seldom] == [
        (1, 4, 4), (1, 4, 0), (2, 8, 4), (2, 8, 0), (3, 12, 4), (3, 12, 0),
    ]  # fmt: skip
    assert [x for event in seldom for x in event.losses] == [x for event in events for x in event.losses]
    assert seldom[-1].history == events[-1].history
    chex.assert_trees_all_equal(seldom[-1].state, events[-1].state)


def test_the_host_waits_for_the_device_two_steps_behind(steps, start, monkeypatch):
    made, waited = [], []

    def train(*args):
        state, metrics = steps.train(*args)
        made.append(metrics)
        return state, metrics

    def wait(x):
        waited.append((len(made), next(i for i, m in enumerate(made) if m.loss is x)))
        return x

    monkeypatch.setattr(loop.jax, "block_until_ready", wait)
    next(loop.fit(steps._replace(train=train), *start, DATA, SCHEDULE, every=1e9))
    assert waited == [(3, 0), (4, 1)]


def test_an_answer_that_is_not_finite_is_one_line(steps, start):
    bad = lambda trainable, frozen, batch: np.full((len(batch.labels), 2), np.nan)
    with pytest.raises(UserError, match="answers are not finite after step 4"):
        list(loop.fit(steps._replace(eval=bad), *start, DATA, SCHEDULE))


SEVERAL = [Schedule(num_epochs=2, seed=seed, key=jax.random.key(seed)) for seed in (5, 6, 7)]


@pytest.fixture(scope="module")
def several():
    """Three runs of one model: each with its own head, leaves, fixed leaves, order of rows and dropout."""
    method = jpeft.chain(jpeft.lora(rank=2), jpeft.said(8, targets="query"))
    x = jax.numpy.ones((1, 8), int)
    base, sites = INIT(jax.random.key(0), x)["params"], jpeft.sites(MODEL, x)
    found = []
    for schedule in SEVERAL:
        head = INIT(schedule.key, x)["params"]["classifier"]
        leaves = jpeft.init(method, schedule.key, sites, {**base, "classifier": head})
        found.append(jpeft.partition(method, {**base, "classifier": head}, leaves, trains="classifier"))
    optimizer = optim.adamw(optax.constant_schedule(1e-2), 0.1, found[0])
    states = [stepping.init_state(parts.trainable, optimizer) for parts in found]
    train, evaluate = stepping.train_step(MODEL, method, optimizer), stepping.eval_step(MODEL, method)
    alone = Steps(Compiled(train, 2), Compiled(evaluate, 2))
    train, evaluate = (chex.assert_max_traces(fn, n=2) for fn in (train, evaluate))  # one for each padded length
    together = Steps(Compiled(stepping.together(train, 0), 2), Compiled(stepping.together(evaluate, None), 2))
    frozen = {**found[0].frozen, "peft": stepping.stack([parts.frozen["peft"] for parts in found])}
    return alone, states, [parts.frozen for parts in found], together, stepping.stack(states), frozen


@pytest.mark.slow  # runs are held together and alone in tests/run/test_experiment.py, too
def test_several_runs_together_are_each_as_it_is_alone(several):
    alone, states, frozens, together, stacked, frozen = several
    assert not np.array_equal(*(jax.tree.leaves(each["peft"])[0] for each in frozens[:2]))  # projections of their own
    chex.clear_trace_counter()
    compiled.prepare(together, stacked, frozen, DATA, jax.numpy.stack([each.key for each in SEVERAL]))
    spent = together.train.seconds
    histories, sums = [()] * 3, [0.0] * 3
    both = list(loop.fit_together(together, stacked, frozen, DATA, SEVERAL, histories, sums, every=0))
    assert together.train.seconds == spent
    for i, schedule in enumerate(SEVERAL):
        own = list(loop.fit(alone, states[i], frozens[i], DATA, schedule, every=0))
        for one, other in zip(own, both, strict=True):
            np.testing.assert_allclose(one.losses, other[i].losses, rtol=1e-5)
            np.testing.assert_allclose(one.grad_norms, other[i].grad_norms, rtol=1e-4)
            assert (one.epoch, one.step) == (other[i].epoch, other[i].step)
            if one.logits is not None:
                np.testing.assert_allclose(one.logits, other[i].logits, atol=1e-4)
        chex.assert_trees_all_close(own[-1].state, both[-1][i].state, atol=1e-5)
        assert own[-1].history[-1]["train_loss"] == pytest.approx(both[-1][i].history[-1]["train_loss"], rel=1e-5)
    assert len({each.losses for each in both[0]}) == 3

    # From an event in the middle, they end the same.
    taken = both[5]
    rest = list(
        loop.fit_together(
            together, taken[0].states, frozen, DATA, SEVERAL, [e.history for e in taken], [e.loss_sum for e in taken], 0
        )
    )
    chex.assert_trees_all_equal(rest[-1][0].states, both[-1][0].states)
    assert [e.history for e in rest[-1]] == [e.history for e in both[-1]]


def test_a_loss_of_one_of_several_runs_that_is_not_finite_names_it(several):
    _, _, _, together, stacked, frozen = several

    def train(*args):
        state, metrics = together.train(*args)
        return state, metrics._replace(loss=np.array([1.0, np.inf, 1.0]))

    with pytest.raises(UserError, match="the loss is inf at step 1 of seed 6"):
        list(loop.fit_together(Steps(train, None), stacked, frozen, DATA, SEVERAL, [()] * 3, [0.0] * 3, 0))


def test_a_finished_run_has_no_more_events(steps, start, events):
    assert not list(loop.fit(steps, events[-1].state, start[1], DATA, SCHEDULE, events[-1].history))


def test_a_loss_that_is_not_finite_names_its_step(steps, start):
    calls = iter(range(100))

    def train(*args):
        state, metrics = steps.train(*args)
        return state, metrics._replace(loss=np.float32("nan")) if next(calls) == 5 else metrics

    with pytest.raises(UserError, match=r"the loss is nan at step 6: .*learning_rate"):
        list(loop.fit(steps._replace(train=train), *start, DATA, SCHEDULE))


def test_the_task_s_own_loss_and_score_are_used(start):
    task = TASKS["mrpc"]

    class Doubled(type(task)):
        def loss(self, logits, labels):
            return 2 * super().loss(logits, labels)

        def score(self, logits, labels):
            return {"accuracy": 0.125}

    own = Doubled("own", task.text, task.labels)
    data, schedule = DATA._replace(task=own), SCHEDULE._replace(num_epochs=1)
    losses = []
    for each in (stepping.example_losses, own.loss):
        train = jax.jit(stepping.train_step(MODEL, METHOD, OPTIMIZER, each))
        event = next(loop.fit(Steps(train, None), *start, data, schedule, every=0))
        losses += event.losses
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)
    evaluate = lambda trainable, frozen, batch: np.zeros((len(batch.labels), 2))
    train = lambda state, frozen, batch, key: (state._replace(step=state.step + 1), stepping.StepMetrics(1.0, 1.0))
    *_, last = loop.fit(Steps(train, evaluate), *start, data, schedule)
    assert last.row == {"epoch": 1, "step": 4, "train_loss": 1.0, "accuracy": 0.125}


def test_evaluate_restores_the_order():
    rows = examples(37)

    def first_token(trainable, frozen, batch):
        return np.stack([batch.input_ids[:, 0], batch.attention_mask.sum(axis=1)], axis=1).astype(np.float32)

    logits = loop.evaluate(first_token, {}, {}, rows, (8, 16), batch_size=8)
    np.testing.assert_array_equal(logits[:, 0], [ids[0] for ids in rows.input_ids])
    np.testing.assert_array_equal(logits[:, 1], rows.lengths)
    assert logits.dtype == np.float32
