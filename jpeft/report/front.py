"""What a search found: the plans that no other beats in both score and size, as a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jpeft.plans.plan import Plan
from jpeft.report import formats, tables
from jpeft.report.comparison import Row
from jpeft.report.drawings import COLOURS

__all__ = ["Point", "front", "line", "markdown", "picture"]


class Point(NamedTuple):
    """A plan that was trained in a search.

    Attributes:
      number: of the trial.
      plan: what was trained.
      score: the primary metric; the higher, the better.
      percent: trained parameters of base and head, without the head and what else trains with any plan.
      seconds: that it took.
    """

    number: int
    plan: Plan
    score: float
    percent: float
    seconds: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is as good as in both score and size and better in one; the smallest plan first.

    Of points that are equal in both, all are kept.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.percent, -p.score, p.number)):
        last = kept[-1] if kept else None
        if last is None or point.score > last.score or (point.score, point.percent) == (last.score, last.percent):
            kept.append(point)
    return kept


def line(best: Sequence[Point]) -> str:
    """The front in a line: "81.2 at 0.05 %, 83.4 at 0.4 %"."""
    return ", ".join(f"{100 * point.score:.1f} at {point.percent:.3g} %" for point in best)


def markdown(
    title: str,
    metric: str,
    points: Sequence[Point],
    wanted: int,
    diverged: Sequence[int],
    full: Mapping[int, Row],
    baseline: float,
    picture: str | None,
) -> str:
    """The page.

    Args:
      title: what was searched.
      metric: the name of the score.
      points: all that were trained.
      wanted: how many were to be.
      diverged: numbers of the trials whose training did not stay finite.
      full: by number, what points of the front score with the full recipe.
      baseline: what an answer scores that reads no text.
      picture: its file name, or None.
    """
    best, done = front(points), len(points) + len(diverged)
    lines = [f"# Search: {title}", ""]
    lines += [f"**{done} of {wanted} trials are finished.**", ""] if done < wanted else []
    lines += [
        f"Plans trained by the short recipe: {len(points)}. These are the ones that no other beats in both {metric} "
        "and size. Sizes are trained parameters in percent of base and head, without the head and what else trains "
        f"with any plan. Scores are {metric} of the last epoch in percent; by the full recipe mean ± standard "
        "deviation over seeds, the best and whatever cannot be told from it in bold.",
        "",
        formats.markdown(_table(best, full)),
        "",
        f"An answer that reads no text scores {100 * baseline:.1f}.",
        "",
        *([f"![Scores over trained parameters]({picture})", ""] if picture else []),
        "The short recipe's scores chose these plans, so they flatter them: of many that are alike, one is lucky. The "
        "full recipe's are of the same evaluation rows. To say that a plan is better than another, compare the two by "
        "`python -m jpeft.compare` with several seeds.",
        "",
    ]
    if diverged:
        told = ", ".join(map(str, diverged))
        lines += [f"In these trials training did not stay finite: {told}.", ""]
    if best:
        lines += ["The plan of a row, with any recipe:", "", f"    {_command(best[-1].number)}", ""]
    return "\n".join(lines)


def _table(best: Sequence[Point], full: Mapping[int, Row]) -> formats.Table:
    head = ("plan", "trained %", "short recipe", "full recipe", "seeds", "modules, layer by layer")
    rows = []
    for point in best:
        row = full.get(point.number)
        scores = (_score(row), str(row.num_seeds)) if row else ("-", "-")
        modules = "; ".join(tables.plan_lines(point.plan))
        rows.append((str(point.number), f"{point.percent:.3g}", f"{100 * point.score:.2f}", *scores, modules))
    return head, rows


def _score(row: Row) -> str:
    text = f"{100 * row.mean:.2f}" + ("" if row.std is None else f" ± {100 * row.std:.2f}")
    return f"**{text}**" if row.tied else text


def _command(number: int) -> str:
    return f"python -m jpeft.main --config fishpal,TASK --config.model=MODEL --config.fishpal.plan=front/{number}.json"


def picture(path: Path, points: Sequence[Point], full: Mapping[int, Row], metric: str, title: str) -> None:
    """Writes a PNG: all trials in grey, the front as a line, and as diamonds what its plans score in full.

    Args:
      path: of the PNG.
      points: all that were trained.
      full: by number, what points of the front score with the full recipe.
      metric: the name of the score.
      title: stands above.
    """
    from matplotlib.figure import Figure

    best = front(points)
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    panel = figure.subplots()
    panel.plot(*_places(points), "o", color="0.7", markersize=4, label="trials")
    panel.plot(*_places(best), "o-", color=COLOURS[0], label="front, short recipe")
    if found := [point for point in best if point.number in full]:
        percents, means = [p.percent for p in found], [100 * full[p.number].mean for p in found]
        spreads = [100 * (full[p.number].std or 0.0) for p in found]
        panel.errorbar(percents, means, spreads, fmt="D", color=COLOURS[1], capsize=3, label="front, full recipe")
    for point in best:
        place = (point.percent, 100 * point.score)
        panel.annotate(str(point.number), place, xytext=(4, -11), textcoords="offset points", fontsize=8)
    panel.set_xscale("log")
    panel.set_xlabel("trained parameters in percent of base and head, without the head")
    panel.set_ylabel(f"{metric} in percent")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.percent for point in points], [100 * point.score for point in points]
