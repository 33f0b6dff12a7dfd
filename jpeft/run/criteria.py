"""What FishPAL chooses by: for each criterion, the score of every candidate in every layer, measured on a run's seed.

All but `thesis` and the controls begin by fitting the head on frozen features, attach one candidate at a time, and look
at three disjoint sets of training examples: one for the head, and two halves, so that what is measured on one is judged
on the other.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jpeft.core import transform
from jpeft.core.partition import partition, rates, split
from jpeft.data import batching
from jpeft.data.batching import Examples
from jpeft.importance.fisher import fisher
from jpeft.plans import fishpal, gains
from jpeft.plans import plan as plans
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.plans.plan import Entry
from jpeft.run import config as configs
from jpeft.run.seed import Seed
from jpeft.training import head, optim, step
from jpeft.training.step import single_loss
from jpeft.training.trial import held_out_gradient, held_out_loss, trial

__all__ = ["CRITERIA", "Found"]

RACE_SHARE = 0.08  # of the run's steps, for the whole race; looking at the held-out examples comes on top
RACE_HELD = 256  # held-out examples of a race
WARMUP = 4  # steps of a trial
FIT = 512  # the least number of examples that the head is fitted on
DROP_STEPS = 8
DROP_HELD = 64


class Found(NamedTuple):
    """What a criterion measured.

    Attributes:
      scores: {layer: {candidate: score}}; the higher, the better.
      passes: what it cost, in training passes over one example; a forward pass alone counts a third.
      about: further figures, JSON.
    """

    scores: Scores
    passes: float
    about: Mapping[str, Any] = {}


class Prepared(NamedTuple):
    """A head fitted on frozen features, and the examples to measure on.

    Attributes:
      params: with the fitted head.
      a: one half of the examples.
      b: the other half.
      passes: what it cost.
      rows: the numbers of the examples.
    """

    params: Any
    a: Examples
    b: Examples
    passes: float
    rows: np.ndarray


def prepare(seed: Seed, n: int, labels: np.ndarray | None = None) -> Prepared:
    """Fits the head on other examples, and cuts n into halves. Where the training set is small, it is shared out."""
    train = seed.data.train if labels is None else seed.data.train._replace(labels=labels)
    part = min(n, train.size // 2)
    fit = min(max(FIT, 2 * part), train.size - part)
    drawn, rows = batching.sample(train, part + fit, seed.seed)
    half = part // 2
    a, b, rest = (batching.take(drawn, range(*cut)) for cut in ((0, half), (half, part), (part, part + fit)))
    site = head.last_dense(seed.sites)
    read = jax.jit(head.features(seed.model, site))
    found = np.zeros((rest.size, *site.args[0].shape[1:]), np.float32)
    for batch, index in batching.eval_batches(rest, 32, lengths(seed)):
        found[index] = np.asarray(read(seed.base.params, batch))[: len(index)]
    params = head.fit_head(seed.base.params, site, found, rest.labels)
    return Prepared(params, a, b, rest.size / 3, rows[:part])


def lengths(seed: Seed) -> tuple[int, ...]:
    """The padded lengths to measure at: fewer than to train at, since compiling takes longer than a few examples do."""
    return batching.length_buckets(seed.data.train.lengths, max_buckets=2)


def alone(seed: Seed, entry: Entry) -> tuple[transform.Chain, transform.Leaves, dict[str, float]]:
    """A candidate in every layer of a model without any other, with its leaves and its rate."""
    kinds = configs.rates(seed.config)
    method = plans.build([{"method": entry.method, "options": dict(entry.options)}], kinds)
    return method, transform.init(method, seed.key, seed.sites, seed.base.params), kinds


def thesis(seed: Seed, candidates: Candidates, measure: Callable[..., Any]) -> Found:
    """The rule of the thesis: the mean Fisher information at initialisation, with a random head, times a factor."""
    factors = {name: seed.config.fishpal.factors[name] for name in candidates}
    everything = fishpal.attach(candidates)
    part, fixed = split(transform.init(everything, seed.key, seed.sites, seed.base.params))
    rest = {"params": seed.base.params, "peft": fixed}
    loss, n = single_loss(seed.model, everything, seed.data.task.loss), num_examples(seed)
    information = measure("fisher.safetensors", loss, {"peft": part}, n, rest)["peft"]
    return Found(fishpal.scores(information, n, candidates, factors), n, {"factors": factors})


def by_moments(gain: Callable[..., transform.Leaves], shuffled: bool = False) -> Callable[..., Found]:
    """A criterion on the gradients of single examples; `gain` is called with both halves' moments, rates and seed."""

    def criterion(seed: Seed, candidates: Candidates, measure: Callable[..., Any]) -> Found:
        labels = np.random.default_rng(seed.seed).permutation(seed.data.train.labels) if shuffled else None
        ready = prepare(seed, num_examples(seed), labels)
        scores: Scores = {}
        passes = ready.passes
        for name, entry in candidates.items():
            method, leaves, _ = alone(seed, entry)
            part, fixed = split(leaves)
            loss, rest = single_loss(seed.model, method, seed.data.task.loss), {"params": ready.params, "peft": fixed}
            halves = [_moments(seed, loss, {"peft": part}, half, rest) for half in (ready.a, ready.b)]
            factor, rate = rates(method), configs.learning_rate(seed.config)
            found = gain(*halves, lambda path, factor=factor, rate=rate: rate * factor(path), seed)
            for layer, value in gains.by_layer(found).items():
                scores.setdefault(layer, {})[name] = value
            passes += ready.a.size + ready.b.size
            seed.console.say(f"  {name}: {sum(row[name] for row in scores.values()):.3g} over all layers")
        return Found(dict(sorted(scores.items())), passes, {"train_rows": ready.rows.tolist()})

    return criterion


def _moments(seed: Seed, loss: Any, tree: Any, half: Examples, rest: Any) -> gains.Moments:
    batches, _ = batching.by_length(half, lengths(seed))
    return gains.moments(fisher(loss, tree, batches, rest, values="moments", grouped=True)["peft"], half.size)


def loss_drop(seed: Seed, candidates: Candidates, measure: Callable[..., Any]) -> Found:
    """The decrease of the held-out loss in a few steps of training, attributed to each layer along the way."""
    ready = prepare(seed, 2 * max(DROP_HELD, seed.config.train.batch_size * DROP_STEPS))
    held = batching.take(ready.b, range(min(DROP_HELD, ready.b.size)))
    scores: Scores = {}
    passes = ready.passes
    for name, entry in candidates.items():
        for reached in itertools.islice(_trial(seed, entry, ready.params, ready.a, held, 1, True), DROP_STEPS + 1):
            drop, loss = reached.drop["peft"], reached.loss
        for layer, value in gains.by_layer(drop).items():
            scores.setdefault(layer, {})[name] = value
        passes += DROP_STEPS * seed.config.train.batch_size + (DROP_STEPS + 1) * held.size
        seed.console.say(f"  {name}: held-out loss {loss:.4f} after {DROP_STEPS} steps")
    return Found(dict(sorted(scores.items())), passes)


def race(seed: Seed, candidates: Candidates, measure: Callable[..., Any]) -> Found:
    """A race of uniform plans: each candidate trains in all layers for a small share of the run; by rounds, the better
    half of them, by held-out loss, goes on. The score is the same in every layer.

    Successive halving: Karnin et al. 2013 (ICML); Jamieson and Talwalkar 2016, arXiv:1502.07943.
    """  # fmt: skip
    batch_size, layers = seed.config.train.batch_size, seed.base.config.num_hidden_layers
    total = seed.config.train.num_epochs * batching.num_batches(seed.data.train.size, batch_size)
    alive, sizes = list(candidates), [len(candidates)]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    steps = max(4, round(RACE_SHARE * total / sum(sizes)))
    ready = prepare(seed, 2 * RACE_HELD)
    # All other examples are there to train on; those of the head and the held-out half stay out.
    out = set(ready.rows[ready.a.size :].tolist())
    train = batching.take(seed.data.train, [i for i in range(seed.data.train.size) if i not in out])
    runs: dict[str, Iterator[Any]] = {
        name: _trial(seed, candidates[name], ready.params, train, ready.b, steps, False) for name in alive
    }
    losses: dict[str, float] = {}
    history: list[dict[str, float]] = []
    start = {name: next(run).loss for name, run in runs.items()}
    passes = ready.passes + len(runs) * ready.b.size / 3
    for size in sizes:
        now = {name: next(runs[name]).loss for name in alive}
        passes += len(alive) * (steps * batch_size + ready.b.size / 3)
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in now.items())
        seed.console.say(f"  held-out loss after {steps * (len(history) + 1)} steps: {told}")
        # Who dropped out in an earlier round stays behind all who went on.
        losses = {name: max(loss, *now.values()) for name, loss in losses.items()} | now
        history.append(now)
        alive = sorted(now, key=lambda name: now[name])[: math.ceil(size / 2)]
    common = max(start.values())
    scores = {layer: {name: (common - losses[name]) / layers for name in candidates} for layer in range(layers)}
    return Found(scores, passes, {"steps": steps, "held_out_losses": history})


def _trial(
    seed: Seed, entry: Entry, params: Any, train: Examples, held: Examples, every: int, attribute: bool
) -> Iterator[Any]:
    """A trial of a candidate in all layers, at its own rate, from the fitted head on."""
    method, leaves, _ = alone(seed, entry)
    parts = partition(method, params, leaves, trains=seed.head)
    # A warm-up in which Adam's variances settle, then the full rate: a schedule down to zero would end before it tells.
    schedule = optax.linear_schedule(0.0, configs.learning_rate(seed.config), WARMUP)
    optimizer = optim.adamw(schedule, seed.config.train.weight_decay, parts)
    run = jax.jit(step.train_step(seed.model, method, optimizer, seed.data.task.loss), donate_argnums=0)
    total = held_out_loss(step.eval_step(seed.model, method), seed.data.task.loss)
    total = jax.jit(held_out_gradient(total) if attribute else total)
    batches = _endless(train, seed)
    eyes = [batch for batch, _ in batching.eval_batches(held, 32, lengths(seed))]
    state = step.init_state(parts.trainable, optimizer)
    return trial(run, total, state, parts.frozen, batches, eyes, seed.dropout_key, every, attribute)


def _endless(train: Examples, seed: Seed) -> Iterator[Any]:
    for epoch in itertools.count(1):
        yield from batching.train_batches(train, seed.config.train.batch_size, lengths(seed), seed.seed, epoch)


def control(score: Callable[[Seed, str, int, Any], float]) -> Callable[..., Found]:
    """A criterion that looks at no example: `score(seed, candidate, layer, leaves of the layer)`."""

    def criterion(seed: Seed, candidates: Candidates, measure: Callable[..., Any]) -> Found:
        scores: Scores = {}
        for name, entry in candidates.items():
            _, leaves, _ = alone(seed, entry)
            trained, _ = split(leaves)
            sizes = gains.by_layer(jax.tree.map(lambda x: np.ones(x.shape), trained))
            magnitudes = gains.by_layer(jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), trained))
            for layer in sizes:
                scores.setdefault(layer, {})[name] = score(seed, name, layer, (sizes[layer], magnitudes[layer]))
        return Found(dict(sorted(scores.items())), 0.0)

    return criterion


def num_examples(seed: Seed) -> int:
    """How many examples to measure on: `config.fishpal.num_examples`, or by criterion, at most the training set."""
    n = seed.config.fishpal.num_examples
    n = n if n is not None else 64 if seed.config.fishpal.criterion == "thesis" else 256
    return min(n, seed.data.train.size)


def _random(seed: Seed, name: str, layer: int, sizes: tuple[float, float]) -> float:
    return float(np.random.default_rng([seed.seed, layer, zlib.crc32(name.encode())]).random())


CRITERIA: dict[str, Callable[[Seed, Candidates, Callable[..., Any]], Found]] = {
    "race": race,
    "adam_step": by_moments(lambda a, b, rate, seed: gains.adam_step(a, b, rate, seed.config.train.batch_size)),
    "loss_drop": loss_drop,
    "trace": by_moments(lambda a, b, rate, seed: gains.trace(gains.together(a, b))),
    "thesis": thesis,
    # Controls, which any other criterion should do better than.
    "random": control(_random),
    "size": control(lambda seed, name, layer, sizes: sizes[0]),
    "magnitude": control(lambda seed, name, layer, sizes: sizes[1]),
    "depth": control(lambda seed, name, layer, sizes: 1.0 + layer),
    "shuffled_labels": by_moments(
        lambda a, b, rate, seed: gains.adam_step(a, b, rate, seed.config.train.batch_size), shuffled=True
    ),
}
