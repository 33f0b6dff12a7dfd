"""Short trainings: what is attributed to the entries adds up to what the held-out loss really fell by."""

import itertools

import jax
import numpy as np
import optax
import pytest
from training.test_loop import DATA, METHOD, MODEL

import jpeft
from jpeft.data import batching
from jpeft.data.task import example_losses
from jpeft.training import step
from jpeft.training.trial import held_out_gradient, held_out_loss, trial

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def parts():
    x = jax.numpy.ones((1, 8), int)
    params = MODEL.init(jax.random.key(0), x)["params"]
    leaves = jpeft.init(METHOD, jax.random.key(1), jpeft.sites(MODEL, x), params)
    return jpeft.partition(METHOD, params, leaves, "classifier")


def start(parts, attribute, every, rate=1e-2, averaged=None):
    optimizer = optax.adam(rate)
    total = held_out_loss(step.eval_step(MODEL, METHOD), example_losses)
    held = [batch for batch, _ in batching.eval_batches(DATA.dev, 4, DATA.eval_buckets)]
    batches = (b for epoch in itertools.count(1) for b in batching.train_batches(DATA.train, DATA.layouts, 5, epoch))
    return trial(
        jax.jit(step.train_step(MODEL, METHOD, optimizer)), jax.jit(held_out_gradient(total) if attribute else total),
        step.init_state(parts.trainable, optimizer), parts.frozen, batches, held, KEY, every, attribute, averaged,
    )  # fmt: skip


def held_out(parts):
    """The mean held-out loss before the first step, by hand."""
    eyes = [batch for batch, _ in batching.eval_batches(DATA.dev, 4, DATA.eval_buckets)]
    run = jax.jit(
        lambda batch: example_losses(step.eval_step(MODEL, METHOD)(parts.trainable, parts.frozen, batch), batch.labels)
    )
    return float(np.concatenate([np.asarray(run(batch))[batch.weights > 0] for batch in eyes]).mean())


def test_what_is_attributed_adds_up_to_the_decrease(parts):
    reached, before = list(itertools.islice(start(parts, True, 1, 1e-3), 8)), held_out(parts)
    assert [r.step for r in reached] == list(range(1, 9))
    for r in reached:
        total = sum(float(np.sum(x)) for x in jax.tree.leaves(r.drop))
        assert total == pytest.approx(before - r.loss, abs=0.02 * abs(before - reached[-1].loss) + 1e-6)
    assert any(np.any(x) for x in jax.tree.leaves(reached[-1].drop["peft"]))


def test_the_losses_are_those_of_the_held_out_rows(parts):
    still = next(start(parts, False, 1, rate=0.0))
    assert still.losses.shape == (DATA.dev.size,)
    assert still.loss == pytest.approx(held_out(parts), rel=1e-5)
    assert still.drop is None


@pytest.mark.slow
def test_a_look_is_at_the_mean_of_the_last_third(parts):
    """By hand: the parameters after steps 5 and 6 of 6, and of the next six alone."""
    optimizer = optax.adam(1e-2)
    train = jax.jit(step.train_step(MODEL, METHOD, optimizer))
    total = jax.jit(held_out_loss(step.eval_step(MODEL, METHOD), example_losses))
    eyes = [batch for batch, _ in batching.eval_batches(DATA.dev, 4, DATA.eval_buckets)]
    batches = (b for epoch in itertools.count(1) for b in batching.train_batches(DATA.train, DATA.layouts, 5, epoch))
    state, path = step.init_state(parts.trainable, optimizer), []
    for batch in itertools.islice(batches, 12):
        state, _ = train(state, parts.frozen, batch, KEY)
        path.append(jax.tree.map(np.asarray, state.trainable))
    looks = [*itertools.islice(start(parts, False, 6), 2), next(start(parts, False, 12, averaged=2))]
    for reached, some in zip(looks, (path[4:6], path[10:12], path[10:12]), strict=True):
        mean = jax.tree.map(lambda *x: np.mean(x, 0), *some)
        losses = [np.asarray(total(mean, parts.frozen, b)[1])[b.weights > 0] for b in eyes]
        np.testing.assert_allclose(reached.losses, np.concatenate(losses), rtol=1e-4)


def test_looking_does_not_change_the_training(parts):
    often, seldom = (list(itertools.islice(start(parts, True, n), 6 // n))[-1] for n in (1, 3))
    assert often.step == seldom.step == 6
    assert often.loss == pytest.approx(seldom.loss, rel=1e-6)
