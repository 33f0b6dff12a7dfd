import chex
import jax
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.data.tasks import TASKS
from jpeft.models import Bert, BertConfig
from jpeft.run.console import Console
from jpeft.training import checkpoint, loop, optim
from jpeft.training import step as stepping
from jpeft.training.loop import Schedule

pytestmark = pytest.mark.usefixtures("compiled_soon")

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_labels": 2,
}  # fmt: skip
METHOD = jpeft.chain(jpeft.lora(rank=2))
SCHEDULE = Schedule(num_epochs=3, batch_size=8, seed=5, buckets=(8, 16))
MODEL = Bert(BertConfig(**SHAPE))
OPTIMIZER = optim.adamw(optax.constant_schedule(1e-2), 0.1)
SECONDS: dict[str, float] = {}
STEPS = loop.compile_steps(stepping.train_step(MODEL, METHOD, OPTIMIZER), stepping.eval_step(MODEL, METHOD), SECONDS)


class Killed(Exception):
    pass


def examples(size=28, seed=0):
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(1, 20, n, dtype=np.int32) for n in rng.integers(4, 17, size))
    return Examples(rows, tuple(map(np.zeros_like, rows)), rng.integers(0, 2, size, dtype=np.int32))


def run(folder, steps=STEPS, log=None, train=None, schedule=SCHEDULE):
    """Trains from the start or from what `folder` holds; the log's rows and the result."""
    x = jax.numpy.ones((1, 8), int)
    params = MODEL.init(jax.random.key(0), x)["params"]
    trained, rest = tree.split(params, lambda path: path[0] == "classifier")
    leaves = jpeft.init(METHOD, jax.random.key(1), jpeft.sites(MODEL, x), params)
    state = stepping.init_state({"params": trained, "peft": leaves}, OPTIMIZER)
    frozen = {"params": rest}
    restored = checkpoint.restore(folder / "latest", state)
    return loop.fit(
        steps, state, frozen, train or examples(), examples(10, seed=1), TASKS["mrpc"], schedule, jax.random.key(2), {},
        restored, folder, log or (lambda row: None), Console(quiet=True),
    )  # fmt: skip


def killed_after(calls):
    """The steps, of which the training one dies after so many calls."""
    left = iter(range(calls))

    def train(*args):
        if next(left, None) is None:
            raise Killed
        return STEPS.train(*args)

    return STEPS._replace(train=train)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def check_same(fitted, whole):
    chex.assert_trees_all_equal(fitted.state, whole.state)
    assert fitted.history == whole.history


def test_history_has_a_row_an_epoch(whole):
    assert [(row["epoch"], row["step"]) for row in whole.history] == [(1, 4), (2, 8), (3, 12)]
    assert all(list(row) == ["epoch", "step", "train_loss", "accuracy", "f1"] for row in whole.history)
    assert int(whole.state.step) == 12
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"]
    assert whole.seconds["train"] > 0
    assert whole.seconds["evaluate"] > 0


@pytest.mark.parametrize("calls", [4, 6, 8, 11])
def test_killed_between_checkpoints_it_ends_the_same(tmp_path, whole, calls):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(calls))
    made = []
    check_same(run(tmp_path, log=made.append), whole)
    # Only the epochs that were not finished are made again.
    assert [row["epoch"] for row in made] == list(range(calls // 4 + 1, 4))


@pytest.mark.parametrize("calls", [1, 3, 4, 6, 7])
def test_resumed_in_the_middle_of_an_epoch_it_ends_the_same(tmp_path, whole, calls, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)  # after every step
    with pytest.raises(Killed):
        run(tmp_path, killed_after(calls))
    restored = checkpoint.restore(tmp_path / "latest", whole.state)
    assert restored is not None
    assert int(restored.state.step) == calls
    check_same(run(tmp_path), whole)


def test_killed_while_it_evaluates_it_ends_the_same(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)

    def evaluate(*args):
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, STEPS._replace(eval=evaluate))
    check_same(run(tmp_path), whole)


def test_a_checkpoint_at_every_step_holds_every_epoch(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    run(tmp_path)
    restored = checkpoint.restore(tmp_path / "latest", whole.state)
    assert restored is not None
    assert restored.progress.history == whole.history


def test_a_finished_run_trains_no_more(tmp_path, whole):
    run(tmp_path)
    check_same(run(tmp_path, killed_after(0)), whole)


def test_seconds_add_up_over_starts(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, killed_after(6))
    restored = checkpoint.restore(tmp_path / "latest", run(tmp_path / "other").state)
    assert restored is not None
    assert run(tmp_path).seconds["train"] > restored.progress.seconds["train"] > 0


def test_best_is_the_first_of_the_highest(tmp_path, whole):
    run(tmp_path)
    best = max(whole.history, key=lambda row: row["accuracy"])
    assert [path.name for path in (tmp_path / "best").iterdir() if path.name.isdecimal()] == [str(best["step"])]


def test_steps_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    rows = []
    run(tmp_path, log=rows.append, schedule=SCHEDULE._replace(num_epochs=1))
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert list(rows[0]) == ["epoch", "step", "loss", "grad_norm"]
    assert rows[0]["grad_norm"] > 0


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    calls = iter(range(100))

    def train(*args):
        state, metrics = STEPS.train(*args)
        return state, metrics._replace(loss=np.float32("nan")) if next(calls) == 5 else metrics

    with pytest.raises(UserError, match=r"the loss is nan at step 6: .*learning_rate"):
        run(tmp_path, STEPS._replace(train=train))


def test_evaluate_restores_the_order():
    rows = examples(37)

    def first_token(trainable, frozen, batch):
        return np.stack([batch.input_ids[:, 0], batch.attention_mask.sum(axis=1)], axis=1).astype(np.float32)

    logits = loop.evaluate(first_token, {}, {}, rows, (8, 16), batch_size=8)
    np.testing.assert_array_equal(logits[:, 0], [ids[0] for ids in rows.input_ids])
    np.testing.assert_array_equal(logits[:, 1], rows.lengths)
    assert logits.dtype == np.float32


def test_each_shape_compiles_once_and_is_timed():
    seconds: dict[str, float] = {}
    counted = chex.assert_max_traces(lambda trainable, frozen, batch: batch.labels + trainable, n=2)
    steps = loop.compile_steps(lambda state, frozen, batch, key: (state, 0), counted, seconds)
    chex.clear_trace_counter()
    for length in (8, 16, 8, 16):
        rows = examples(8)._replace(input_ids=tuple(np.ones(length, np.int32) for _ in range(8)))
        rows = rows._replace(token_type_ids=rows.input_ids)
        loop.evaluate(lambda *args: np.asarray(steps.eval(*args))[:, None], np.int32(1), {}, rows, (length,), 8)
    assert seconds["compile"] > 0
