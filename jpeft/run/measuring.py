"""What all criteria measure with: a head fitted on frozen features, disjoint examples, one candidate at a time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core import transform
from jpeft.data import batching, kinds, padding
from jpeft.data.batching import Examples
from jpeft.plans import plan as plans
from jpeft.plans.fishpal import Scores
from jpeft.plans.plan import Entry
from jpeft.run import config as configs
from jpeft.run.seed import Seed
from jpeft.training import head
from jpeft.training.loop import evaluate

__all__ = ["Found", "Prepared", "alone", "lengths", "num_examples", "prepare"]

FIT = 512  # the least number of examples that the head is fitted on
MOST_WORDS = 2048  # that it is fitted on, where words have labels


class Found(NamedTuple):
    """What a criterion measured.

    Attributes:
      scores: {layer: {candidate: score}}; the higher, the better.
      passes: what it cost, in training passes over one example; a forward pass alone counts a third.
      about: further figures, JSON.
      predict: what the criterion says of a whole plan, {layer: candidate}, the higher, the better; None if that is the
        sum of its scores.
    """

    scores: Scores
    passes: float
    about: Mapping[str, Any] = {}
    predict: Callable[[Mapping[int, str]], float] | None = None


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
    fit = min(max(FIT, part), train.size - part)
    drawn, rows = batching.sample(train, part + fit, seed.seed)
    half = part // 2
    a, b, rest = (batching.take(drawn, range(*cut)) for cut in ((0, half), (half, part), (part, part + fit)))
    site = head.last_dense(seed.sites)
    read = jax.jit(head.features(seed.model, site))
    found = evaluate(lambda params, _, batch: read(params, batch), seed.base.params, {}, rest, lengths(seed))
    params = head.fit_head(seed.base.params, site, *_enough(found, rest))
    return Prepared(params, a, b, rest.size / 3, rows[:part])


def _enough(found: np.ndarray, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels to fit a head on: of tagging, of a sample of the words, without tags that hardly occur."""
    if examples.unlabelled is None:
        return found, examples.labels
    labels = kinds.flat(examples.labels)
    chosen = batching.drawn(len(labels), MOST_WORDS, 0)
    counts = np.bincount(labels[chosen])
    chosen = chosen[counts[labels[chosen]] >= head.LEAST]
    return found[chosen], labels[chosen]


def lengths(seed: Seed, most: int = 2) -> tuple[int, ...]:
    """The padded lengths to measure at: fewer than to train at, since compiling takes longer than a few examples do."""
    found = padding.length_buckets(seed.data.train.lengths, max_buckets=most)
    return tuple(min(length, seed.data.longest) for length in found)  # which the model takes


def alone(seed: Seed, entry: Entry) -> tuple[transform.Chain, transform.Leaves]:
    """A candidate in every layer of a model without any other, at its own learning rate, and its leaves."""
    modules = [{"method": entry.method, "options": dict(entry.options)}]
    method = plans.build(modules, configs.rates(seed.config))
    return method, transform.init(method, seed.key, seed.sites, seed.base.params)


def num_examples(seed: Seed) -> int:
    """How many examples to measure on: `config.fishpal.num_examples`, or by criterion, at most the training set."""
    n = seed.config.fishpal.num_examples
    n = n if n is not None else {"thesis": 64, "kernel": 128}.get(seed.config.fishpal.criterion, 256)
    return min(n, seed.data.train.size)
