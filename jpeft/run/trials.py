"""Criteria that train: each candidate alone, for a few steps or for a share of the run, watched on other examples."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jpeft.core.errors import UserError
from jpeft.core.partition import partition
from jpeft.data import batching, padding
from jpeft.data.batching import Examples
from jpeft.data.padding import Layout
from jpeft.plans import gains
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.plans.plan import Entry
from jpeft.run import config as configs
from jpeft.run.measuring import Found, alone, lengths, prepare
from jpeft.run.seed import Seed
from jpeft.training import optim, step
from jpeft.training.trial import Reached, held_out_gradient, held_out_loss, trial

__all__ = ["leading", "loss_drop", "race", "race_steps", "ranking", "tried"]

RACE_SHARE = 0.08  # of the run's steps, for the whole race
RACE_MOST = 0.1  # of the run's passes, with what looking at the held-out examples takes on top
RACE_HELD = 256  # held-out examples of a race
LEAST_ROWS = 8  # to train on and to hold out
TELLING = 30  # steps before a look tells anything: a faster rate is behind at first (docs/choice.md)
DROP_STEPS = 8
DROP_HELD = 64  # held-out examples of `loss_drop`
WARMUP = 4  # steps of a trial
DIVERGED = 1e9  # the held-out loss of what diverged


def loss_drop(seed: Seed, candidates: Candidates) -> Found:
    """The decrease of the held-out loss in a few steps of training, attributed to each layer along the way."""
    ready = prepare(seed, 2 * max(DROP_HELD, seed.config.train.batch_size * DROP_STEPS))
    held = batching.take(ready.b, range(min(DROP_HELD, ready.b.size)))
    scores: Scores = {}
    passes = ready.passes
    for name, entry in candidates.items():
        for reached in itertools.islice(tried(seed, entry, ready.params, ready.a, held, 1, True), DROP_STEPS):
            drop, loss = reached.drop["peft"], reached.loss
        for layer, value in gains.by_layer(drop).items():
            scores.setdefault(layer, {})[name] = value
        passes += DROP_STEPS * seed.config.train.batch_size + (DROP_STEPS + 1) * held.size
        seed.console.say(f"  {name}: held-out loss {loss:.4f} after {DROP_STEPS} steps")
    return Found(dict(sorted(scores.items())), passes)


def race(seed: Seed, candidates: Candidates) -> Found:
    """A race of uniform plans: each candidate trains in all layers for a small share of the run; in each round the
    better half of them goes on, by held-out loss. The score is the same in every layer. The winner then races against
    itself at other learning rates, `config.fishpal.rates`.

    A lead of less than one standard error is no lead: among candidates that close to the best, the one that
    the config names first is ahead (the rule of Breiman et al. 1984, *Classification and Regression Trees*). Successive
    halving: Karnin et al. 2013 (ICML); Jamieson and Talwalkar 2016, arXiv:1502.07943.

    It begins with the head that the run begins with, and not with a fitted one. On top of that, held-out losses rise in
    the first steps, and the more the higher the rate is: the weights of a fitted head are large (docs/choice.md).

    Short runs have too few steps for both. There the candidate that is named first is taken, and all steps go to its
    rates, which differ sooner than kinds of modules do, and by more.
    """
    batch_size, layers = seed.config.train.batch_size, seed.base.config.num_hidden_layers
    total = seed.config.train.num_epochs * batching.num_batches(seed.data.train.size, batch_size)
    sizes = [len(candidates)]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    own, *faster = configs.raced_rates(seed.config)
    if seed.data.train.size < LEAST_ROWS:
        raise UserError(f"a race holds out a quarter of the training rows: {seed.data.train.size} are too few for it")
    held, rows = batching.sample(seed.data.train, min(RACE_HELD, seed.data.train.size // 4), seed.seed)
    # All others are there to train on.
    train = batching.take(seed.data.train, np.setdiff1d(np.arange(seed.data.train.size), rows))

    def steps_of(sizes: Sequence[int]) -> int:
        fixed = (sum(sizes) + len(faster)) * held.size / 3 / (total * batch_size)
        return race_steps(total, [*sizes, *(len(sizes) for _ in faster)], fixed)

    steps, alive = steps_of(sizes), list(candidates)
    if faster and steps < TELLING and len(alive) > 1:
        sizes, alive = [1], alive[:1]
        steps = steps_of(sizes)
        seed.console.say(f"  too short a run to tell kinds of modules apart: {alive[0]}, which is named first")

    def begun(name: str, every: int, rate: float) -> Iterator[Reached]:
        # All over equally many steps, whenever they are looked at: so only what races differs.
        return tried(seed, candidates[name], seed.base.params, train, held, every, False, rate, -(-steps // 3))

    runs = {name: begun(name, steps, own) for name in alive}
    passes, order, history = 0.0, [], []
    for size in sizes:
        losses = {name: bounded(next(runs[name]).losses) for name in alive}
        passes += len(alive) * (steps * batch_size + held.size / 3)
        history.append(_finite(losses))
        told = ", ".join(f"{name} {loss}" for name, loss in _shown(losses).items())
        seed.console.say(f"  held-out loss after {steps * len(history)} steps: {told}")
        if not history[-1]:
            raise UserError(f"no candidate has a finite held-out loss after {steps} steps: try lower learning rates")
        ranked = ranking(losses)
        alive = [name for name in candidates if name in ranked[: math.ceil(size / 2)]]
        order = [*ranked, *(name for name in order if name not in ranked)]
    order += [name for name in candidates if name not in order]
    # Ranks, not losses, since those who dropped out early have not trained as long.
    scores = {name: float(len(order) - order.index(name)) for name in candidates}
    about = {"steps": steps, "held_out_losses": history, **({} if own == 1 else {"rate": own})}
    if faster:
        most = steps * len(sizes)
        rivals = {f"{rate:g}": bounded(next(begun(order[0], most, rate)).losses) for rate in faster}
        passes += len(faster) * (most * batch_size + held.size / 3)
        by_rate = {f"{own:g}": losses[order[0]], **rivals}
        about |= {"rate": float(leading(by_rate)), "rate_losses": _finite(by_rate)}
        told = ", ".join(f"{loss} at {name} times its rate" for name, loss in _shown(by_rate).items())
        seed.console.say(f"  {order[0]}: held-out loss {told}; taken: {about['rate']:g}")
    return Found(dict.fromkeys(range(layers), scores), passes, about)


def bounded(losses: np.ndarray) -> np.ndarray:
    """The losses, finite, so that what diverged is behind all that did not."""
    return losses if np.isfinite(losses).all() else np.full_like(losses, DIVERGED)


def _finite(losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean losses of those that did not diverge."""
    return {name: float(own.mean()) for name, own in losses.items() if own.mean() < DIVERGED}


def _shown(losses: Mapping[str, np.ndarray]) -> dict[str, str]:
    found = _finite(losses)
    return {name: f"{found[name]:.4f}" if name in found else "not finite" for name in losses}


def race_steps(total: int, sizes: Sequence[int], fixed: float) -> int:
    """Steps from one look to the next, at least 4.

    Args:
      total: steps of the run.
      sizes: how many candidates train in each round.
      fixed: the share of the run's passes that looking takes. In short runs it leaves less for training, so that all
        together take at most `RACE_MOST`.
    """
    return max(4, min(round(RACE_SHARE * total / sum(sizes)), math.floor((RACE_MOST - fixed) * total / sum(sizes))))


def ranking(losses: Mapping[str, np.ndarray]) -> list[str]:
    """Names from the best to the worst: first those within one standard error of the lowest mean loss, in their order.

    It is the standard error of that mean itself, not of paired differences: in so few steps candidates differ by
    little, and consistently, in ways that say nothing about where they will end.

    Args:
      losses: {name: [n]}, of the same examples.
    """
    best = min(losses.values(), key=np.mean)
    limit = best.mean() + best.std(ddof=1) / math.sqrt(best.size)
    tied = [name for name, own in losses.items() if own.mean() <= limit]
    return [*tied, *sorted((name for name in losses if name not in tied), key=lambda name: losses[name].mean())]


def leading(losses: Mapping[str, np.ndarray]) -> str:
    """The rate that is ahead: the first one, unless another leads by more than one standard error of the difference.

    That of paired differences: these are one module from one start on the same batches, so what differs is the rate.

    Args:
      losses: {rate: [n]}, of the same examples.
    """
    best = next(iter(losses))
    for name, own in losses.items():
        lead = losses[best] - own
        if lead.mean() > lead.std(ddof=1) / math.sqrt(lead.size):
            best = name
    return best


def tried(
    seed: Seed,
    entry: Entry,
    params: Any,
    train: Examples,
    held: Examples,
    every: int,
    attribute: bool,
    rate: float = 1,
    averaged: int | None = None,
) -> Iterator[Reached]:
    """A trial of a candidate in all layers, at a multiple of its own rate, from `params` on."""
    method, leaves = alone(seed, entry)
    parts = partition(method, params, leaves, trains=seed.head)
    # A warm-up in which Adam's variances settle, then the full rate: a schedule down to zero would end before it tells.
    schedule = optax.linear_schedule(0.0, rate * configs.learning_rate(seed.config), WARMUP)
    optimizer = optim.adamw(schedule, seed.config.train.weight_decay, parts)
    run = jax.jit(step.train_step(seed.model, method, optimizer, seed.data.task.loss), donate_argnums=0)
    total = held_out_loss(step.eval_step(seed.model, method), seed.data.task.loss)
    total = jax.jit(held_out_gradient(total) if attribute else total)
    # Few, since compiling takes longer than a few steps do.
    layouts = padding.layouts(train.lengths, seed.config.train.batch_size, 2, 2, longest=seed.data.longest)
    batches = _endless(train, layouts, seed)
    eyes = [batch for batch, _ in batching.eval_batches(held, 32, lengths(seed))]
    state = step.init_state(parts.trainable, optimizer)
    return trial(run, total, state, parts.frozen, batches, eyes, seed.dropout_key, every, attribute, averaged)


def _endless(train: Examples, layouts: Sequence[Layout], seed: Seed) -> Iterator[Any]:
    for epoch in itertools.count(1):
        yield from batching.train_batches(train, layouts, seed.seed, epoch)
