"""Scores along an axis: how they grow with trained parameters, examples, a dimension or a learning rate."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.report.comparison import Outcome
from jpeft.report.drawings import COLOURS, Draw
from jpeft.report.formats import Table

__all__ = ["Point", "drawing", "first", "series", "table", "within"]

NEAR = 0.01  # of a score: what counts as no worse than the best
SHARE = 0.9  # of the reference: d90 of Aghajanyan et al. 2020, arXiv:2012.13255
SIGMAS = 3


class Point(NamedTuple):
    """One variant of a series.

    Attributes:
      x: where it stands.
      scores: the primary metric, one a seed.
    """

    x: float
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean score over the seeds."""
        return float(np.mean(self.scores))


def series(
    outcomes: Sequence[Outcome], curves: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, list[Point]]]:
    """What finished runs say of each curve.

    Args:
      outcomes: of the runs.
      curves: {curve: {variant: its place on the axis}}; None for the percentage of parameters that it trains.

    Returns:
      {task: {curve: points by their place}}; variants without a finished run are left out, as are empty curves.
    """
    found: dict[str, dict[str, list[Point]]] = {}
    for task in dict.fromkeys(o.task.name for o in outcomes):
        for curve, places in curves.items():
            points = []
            for variant, place in places.items():
                runs = [o for o in outcomes if (o.task.name, o.variant) == (task, variant)]
                if runs:
                    x = float(np.mean([o.trainable_percent for o in runs])) if place is None else float(place)
                    points.append(Point(x, tuple(o.score() for o in runs)))
            if points:
                found.setdefault(task, {})[curve] = sorted(points)
    return found


def within(points: Sequence[Point], near: float = NEAR) -> tuple[float, float]:
    """The range around the best point, without a gap, in which no mean is behind it by more than `near`."""
    means = [point.mean for point in points]
    low = high = best = int(np.argmax(means))
    while low > 0 and means[low - 1] >= means[best] - near:
        low -= 1
    while high < len(means) - 1 and means[high + 1] >= means[best] - near:
        high += 1
    return points[low].x, points[high].x


def first(points: Sequence[Point], score: float) -> float | None:
    """The smallest place at which the mean reaches a score; None if none does."""
    return next((point.x for point in points if point.mean >= score), None)


def table(found: Mapping[str, Mapping[str, Sequence[Point]]], reference: Mapping[str, float]) -> Table:
    """A row for each task and curve.

    Args:
      found: from `series`.
      reference: {task: a score to hold them against}, such as that of full fine-tuning; may lack tasks.
    """
    share = f"first at {100 * SHARE:.0f} % of the reference"
    rows = []
    for task, curves in found.items():
        for curve, points in curves.items():
            best = max(points, key=lambda point: point.mean)
            low, high = within(points)
            reached = first(points, SHARE * reference[task]) if task in reference else None
            told = "-" if task not in reference else "none" if reached is None else f"{reached:g}"
            rows.append((task, curve, f"{100 * best.mean:.1f}", f"{best.x:.3g}", f"{low:.3g} to {high:.3g}", told))
    return ("task", "curve", "best", "at", f"within {100 * NEAR:.0f} point", share), rows


def drawing(
    found: Mapping[str, Mapping[str, Sequence[Point]]],
    axis: str,
    metrics: Mapping[str, str],
    reference: Mapping[str, float],
    baseline: Mapping[str, float],
) -> tuple[float, float, Draw]:
    """Width, height and picture: a panel for each task, a line for each curve, a band of three deviations.

    More curves than there are colours are divided among several panels of a task, with the same axes.

    Args:
      found: from `series`.
      axis: what the places are.
      metrics: {task: name of its primary metric}.
      reference: as in `table`; a solid grey line.
      baseline: {task: the score of an answer that reads no text}; a dashed one.
    """

    parts = math.ceil(max(map(len, found.values()), default=1) / len(COLOURS))
    rows, columns = (1, len(found)) if parts == 1 else (len(found), parts)
    shown = [(task, dict([*curves.items()][i::parts])) for task, curves in found.items() for i in range(parts)]

    def draw(figure: Any) -> None:
        shared = "row" if parts > 1 else "none"
        panels = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).flat
        for panel, (task, curves) in zip(panels, shown, strict=True):
            # Colours that differ for everyone, and markers that differ in print.
            styles = zip(COLOURS, "osD^vXP", strict=True)
            for (curve, points), (colour, marker) in zip(curves.items(), styles, strict=False):
                x, means = [point.x for point in points], np.array([100 * point.mean for point in points])
                panel.plot(x, means, marker=marker, color=colour, markersize=4, label=curve)
                spread = [100 * np.std(p.scores, ddof=1) if len(p.scores) > 1 else 0.0 for p in points]
                band = SIGMAS * np.array(spread)
                if band.any():
                    panel.fill_between(x, means - band, means + band, color=colour, alpha=0.15, linewidth=0)
            if task in reference:
                panel.axhline(100 * reference[task], color="grey", linewidth=1, label="reference")
            panel.axhline(100 * baseline[task], color="grey", linewidth=1, linestyle="--", label="without reading")
            if all(point.x > 0 for points in curves.values() for point in points):
                panel.set_xscale("log")
            panel.set_title(task, fontsize=10)
            panel.set_xlabel(axis, fontsize=9)
            panel.set_ylabel(f"{metrics[task]} in percent", fontsize=9)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)

    return 1 + 4.2 * columns, 3.8 * rows, draw
