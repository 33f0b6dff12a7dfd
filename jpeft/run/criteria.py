"""What FishPAL chooses by: for each criterion, the score of every candidate in every layer, measured on a run's seed.

All but `race`, `thesis`, `random`, `size`, `magnitude` and `depth` begin by fitting the head on frozen features, attach
one candidate at a time, and look at three disjoint sets of training examples: one for the head, and two halves, so that
what is measured on one is judged on the other.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jpeft.core import transform
from jpeft.core.partition import rates, split
from jpeft.data import batching
from jpeft.data.batching import Examples
from jpeft.importance.fisher import fisher
from jpeft.plans import fishpal, gains
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.run import config as configs
from jpeft.run import measured
from jpeft.run.kernels import by_kernel
from jpeft.run.measuring import Found, alone, lengths, num_examples, prepare
from jpeft.run.seed import Seed
from jpeft.run.trials import loss_drop, race
from jpeft.training import placement
from jpeft.training.step import single_loss

__all__ = ["CRITERIA"]


def thesis(seed: Seed, candidates: Candidates) -> Found:
    """The rule of the thesis: the mean Fisher information at initialisation, with a random head, times a factor."""
    factors = {name: seed.config.fishpal.factors[entry.method] for name, entry in candidates.items()}
    everything = fishpal.attach(candidates)
    part, fixed = split(transform.init(everything, seed.key, seed.sites, seed.base.params))
    rest = {"params": seed.base.params, "peft": fixed}
    loss, n = single_loss(seed.model, everything, seed.data.task.loss), num_examples(seed)
    information = measured.information(seed, "fisher.safetensors", loss, {"peft": part}, n, rest)["peft"]
    return Found(fishpal.scores(information, n, candidates, factors), n, {"factors": factors})


def by_moments(gain: Callable[..., transform.Leaves], shuffled: bool = False) -> Callable[..., Found]:
    """A criterion on the gradients of single examples; `gain` is called with both halves' moments, rates and seed."""

    def criterion(seed: Seed, candidates: Candidates) -> Found:
        labels = _shuffled(seed.data.train, seed.seed) if shuffled else None
        ready = prepare(seed, num_examples(seed), labels)
        scores: Scores = {}
        passes = ready.passes
        for name, entry in candidates.items():
            method, leaves = alone(seed, entry)
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


def _shuffled(examples: Examples, seed: int) -> np.ndarray:
    """The labels in a random order; where they are by token, those of the words among themselves."""
    rng, labels = np.random.default_rng(seed), examples.labels.copy()
    if examples.unlabelled is None:
        return rng.permutation(labels)
    words = labels != examples.unlabelled
    labels[words] = rng.permutation(labels[words])
    return labels


def _moments(seed: Seed, loss: Any, tree: Any, half: Examples, rest: Any) -> gains.Moments:
    batches, _ = batching.by_length(half, lengths(seed))
    devices = placement.own_devices()
    found = fisher(loss, tree, batches, rest, values="moments", mesh=devices, grouped=True)
    return gains.moments(found["peft"], half.size)


def control(score: Callable[[Seed, str, int, Any], float]) -> Callable[..., Found]:
    """A criterion that looks at no example: `score(seed, candidate, layer, (entries, sum of magnitudes))`."""

    def criterion(seed: Seed, candidates: Candidates) -> Found:
        scores: Scores = {}
        for name, entry in candidates.items():
            trained, _ = split(alone(seed, entry)[1])
            sizes = gains.by_layer(jax.tree.map(lambda x: np.ones(x.shape), trained))
            magnitudes = gains.by_layer(jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), trained))
            for layer in sizes:
                scores.setdefault(layer, {})[name] = score(seed, name, layer, (sizes[layer], magnitudes[layer]))
        return Found(dict(sorted(scores.items())), 0.0)

    return criterion


def _random(seed: Seed, name: str, layer: int, of: tuple[float, float]) -> float:
    return float(np.random.default_rng([seed.seed, layer, zlib.crc32(name.encode())]).random())


CRITERIA: dict[str, Callable[[Seed, Candidates], Found]] = {
    "race": race,
    "adam_step": by_moments(lambda a, b, rate, seed: gains.adam_step(a, b, rate, seed.config.train.batch_size)),
    "loss_drop": loss_drop,
    "kernel": by_kernel,
    "trace": by_moments(lambda a, b, rate, seed: gains.trace(gains.together(a, b))),
    "thesis": thesis,
    # Controls, which any other criterion should do better than.
    "random": control(_random),
    "size": control(lambda seed, name, layer, of: of[0]),
    "magnitude": control(lambda seed, name, layer, of: of[1]),
    "depth": control(lambda seed, name, layer, of: 1.0 + layer),
    "shuffled_labels": by_moments(
        lambda a, b, rate, seed: gains.adam_step(a, b, rate, seed.config.train.batch_size), shuffled=True
    ),
}
