"""Compares variants over tasks and seeds, with the noise of both the seeds and the evaluation rows in the intervals.

Two variants are compared on the same rows and the same seeds. The paired bootstrap draws rows and seeds anew, the same
for both, and asks how far their difference moves (Efron and Tibshirani 1993; Berg-Kirkpatrick et al. 2012, EMNLP).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jpeft.data.kinds import IGNORED
from jpeft.data.metrics import TAGS, entity_counts, entity_shares
from jpeft.data.task import Task

__all__ = ["DRAWS", "LEVEL", "Outcome", "Row", "baselines", "interval", "resampled", "summarise"]

DRAWS = 400
LEVEL = 95  # percent, of the intervals


class Outcome(NamedTuple):
    """One finished run.

    Attributes:
      task: which.
      variant: the name of what is compared.
      seed: of the run.
      predictions: [n, ...], answers of the form of the labels.
      labels: [n, ...], the same for all runs of a task.
      trainable_percent: of base and head.
      added_percent: likewise, at inference.
      logits: as `Task.score` takes them, where that is the user's own; None where the answers say all there is.
    """

    task: Task
    variant: str
    seed: int
    predictions: np.ndarray
    labels: np.ndarray
    trainable_percent: float
    added_percent: float
    logits: np.ndarray | None = None

    def score(self, rows: np.ndarray | None = None) -> float:
        """The primary metric, of these rows or of all."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        if self.logits is None:
            logits = self.task.answers.express(self.predictions[rows], self.task.num_labels)
        elif self.task.answers.by_token:  # those of the words, row after row
            ends = np.cumsum((self.labels != IGNORED).sum(1))
            words = np.split(self.logits, ends[:-1])
            logits = np.concatenate([words[i] for i in rows])
        else:
            logits = self.logits[rows]
        return self.task.score(logits, self.labels[rows])[self.task.primary]


class Row(NamedTuple):
    """A variant on a task.

    Attributes:
      mean: of the primary metric over the seeds.
      std: its standard deviation over the seeds (ddof 1); None with one seed.
      num_seeds: how many there are.
      behind: the mean difference from the best variant, over the seeds that both have; 0 for the best one.
      interval: of that difference; (0, 0) for the best one. Infinite if hardly any draw of rows has a score.
      trainable_percent: mean over the seeds.
      added_percent: likewise.
      against: the mean difference from the reference, and its interval; None without one.
    """

    mean: float
    std: float | None
    num_seeds: int
    behind: float
    interval: tuple[float, float]
    trainable_percent: float
    added_percent: float
    against: tuple[float, tuple[float, float]] | None = None

    @property
    def tied(self) -> bool:
        """Whether it cannot be told from the best one."""
        return self.interval[1] >= 0


def summarise(outcomes: Sequence[Outcome], draws: int = DRAWS, reference: str = "") -> dict[str, dict[str, Row]]:
    """{task: {variant: row}}, the best variant of each task first.

    Args:
      outcomes: of all tasks.
      draws: of evaluation rows, for intervals.
      reference: the variant that all others are also held against, if it is among them.
    """
    found = {}
    for task in dict.fromkeys(o.task.name for o in outcomes):
        by_variant: dict[str, dict[int, Outcome]] = {}
        for o in outcomes:
            if o.task.name == task:
                by_variant.setdefault(o.variant, {})[o.seed] = o
        scores = {name: [o.score() for o in runs.values()] for name, runs in by_variant.items()}
        order = sorted(scores, key=lambda name: -float(np.mean(scores[name])))
        drawn = {name: {seed: resampled(o, draws) for seed, o in runs.items()} for name, runs in by_variant.items()}
        found[task] = {}
        for name in order:
            behind, interval = difference(by_variant[name], by_variant[order[0]], drawn[name], drawn[order[0]])
            against = None
            if reference in by_variant:
                against = difference(by_variant[name], by_variant[reference], drawn[name], drawn[reference])
            values, runs = scores[name], by_variant[name].values()
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            sizes = (float(np.mean([getattr(o, f) for o in runs])) for f in ("trainable_percent", "added_percent"))
            found[task][name] = Row(float(np.mean(values)), std, len(values), behind, interval, *sizes, against=against)
    return found


def resampled(outcome: Outcome, draws: int) -> np.ndarray:
    """The scores [draws] on rows drawn with replacement: the same rows for all outcomes of a task.

    NaN where a score of the user's own is not defined, as an area under a curve on rows of one class.
    """
    rng, n = np.random.default_rng(0), len(outcome.labels)
    drawn, task = (rng.integers(0, n, n) for _ in range(draws)), outcome.task
    if task.own_score:
        return np.array([_own(outcome, rows) for rows in drawn])
    if task.primary in TAGS:  # the entities of a sentence are read once, since that takes the time
        counts = entity_counts(task.labels, outcome.predictions, outcome.labels, IGNORED)
        return np.array([entity_shares(counts[rows])[task.primary] for rows in drawn])
    return np.array([outcome.score(rows) for rows in drawn])


def _own(outcome: Outcome, rows: np.ndarray) -> float:
    try:
        return outcome.score(rows)
    except ValueError:
        return float("nan")


def difference(
    one: Mapping[int, Outcome],
    other: Mapping[int, Outcome],
    drawn_one: Mapping[int, np.ndarray],
    drawn_other: Mapping[int, np.ndarray],
) -> tuple[float, tuple[float, float]]:
    """How much better `one` is than `other`: the mean over the seeds that both have, and its interval.

    Args:
      one: {seed: outcome}.
      other: likewise.
      drawn_one: {seed: scores on rows drawn anew}, from `resampled`.
      drawn_other: likewise.

    Returns:
      The difference and the ends of its interval, which is infinite if more than half of the draws have no score; NaN
      and an infinite interval if there is no common seed.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return float("nan"), (float("-inf"), float("inf"))
    behind = float(np.mean([one[s].score() - other[s].score() for s in seeds]))
    return behind, interval(np.stack([drawn_one[s] - drawn_other[s] for s in seeds]))


def interval(gaps: np.ndarray) -> tuple[float, float]:
    """Of the mean of differences by seed and draw of rows, [seeds, draws]: seeds are drawn anew, too.

    NaN is a draw without a score. Where more than half of them have none, the interval is infinite.
    """
    picked = np.random.default_rng(1).integers(0, len(gaps), gaps.shape)
    means = np.take_along_axis(gaps, picked, axis=0).mean(0)
    means = means[~np.isnan(means)]
    if means.size < gaps.shape[1] / 2:
        return float("-inf"), float("inf")
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def baselines(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """{task: the score of an answer that reads no text}, the most frequent class or the mean of the evaluation rows."""
    firsts = {outcome.task.name: outcome for outcome in reversed(outcomes)}
    return {name: o.task.baseline(o.labels, o.labels)[o.task.primary] for name, o in firsts.items()}
