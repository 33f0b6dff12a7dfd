import chex
import jax
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.data.task import Data
from jpeft.data.tasks import TASKS
from jpeft.models import Bert, BertConfig
from jpeft.training import loop, optim
from jpeft.training import step as stepping
from jpeft.training.loop import Compiled, Schedule, Steps

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_labels": 2,
}  # fmt: skip
METHOD = jpeft.chain(jpeft.lora(rank=2))
SCHEDULE = Schedule(num_epochs=3, batch_size=8, seed=5, key=jax.random.key(2))
MODEL = Bert(BertConfig(**SHAPE))
OPTIMIZER = optim.adamw(optax.constant_schedule(1e-2), 0.1)


def examples(size=28, seed=0):
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(1, 20, n, dtype=np.int32) for n in rng.integers(4, 17, size))
    return Examples(rows, tuple(map(np.zeros_like, rows)), rng.integers(0, 2, size, dtype=np.int32))


DATA = Data(TASKS["mrpc"], examples(), examples(10, seed=1), (8, 16), (8, 16))


@pytest.fixture(scope="module")
def steps():
    """Without giving up the state's buffers: the tests look at what went before."""
    train, evaluate = stepping.train_step(MODEL, METHOD, OPTIMIZER), stepping.eval_step(MODEL, METHOD)
    return Steps(Compiled(train, 2), Compiled(evaluate, 2))


@pytest.fixture(scope="module")
def start():
    x = jax.numpy.ones((1, 8), int)
    params = MODEL.init(jax.random.key(0), x)["params"]
    leaves = jpeft.init(METHOD, jax.random.key(1), jpeft.sites(MODEL, x), params)
    parts = jpeft.partition(METHOD, params, leaves, trains="classifier")
    return stepping.init_state(parts.trainable, OPTIMIZER), parts.frozen


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


def test_prepared_programs_are_all_that_a_run_needs(start):
    train = chex.assert_max_traces(stepping.train_step(MODEL, METHOD, OPTIMIZER), n=2)
    steps = Steps.compiled(train, chex.assert_max_traces(stepping.eval_step(MODEL, METHOD), n=2))
    chex.clear_trace_counter()
    loop.prepare(steps, *start, DATA, SCHEDULE)
    spent = steps.train.seconds, steps.eval.seconds
    assert min(spent) > 0
    state = jax.tree.map(jax.numpy.array, start[0])  # its buffers are given up
    list(loop.fit(steps, state, start[1], DATA, SCHEDULE))
    assert (steps.train.seconds, steps.eval.seconds) == spent


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


def test_each_shape_compiles_once_and_is_timed():
    counted = chex.assert_max_traces(lambda trainable, frozen, batch: batch.labels + trainable, n=2)
    steps = Steps.compiled(lambda state, frozen, batch, key: (state, 0), counted)
    chex.clear_trace_counter()
    for length in (8, 16, 8, 16):
        rows = examples(8)._replace(input_ids=tuple(np.ones(length, np.int32) for _ in range(8)))
        rows = rows._replace(token_type_ids=rows.input_ids)
        loop.evaluate(lambda *args: np.asarray(steps.eval(*args))[:, None], np.int32(1), {}, rows, (length,), 8)
    assert steps.eval.seconds > 0
    assert steps.train.seconds == 0
