"""The page of a comparison, as Markdown and as HTML: scores by task and variant, how far each is behind the best."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpeft.report import answers, document, drawings, formats
from jpeft.report.comparison import DRAWS, LEVEL, Outcome, Row
from jpeft.report.drawings import Draw
from jpeft.report.formats import Table
from jpeft.report.published import Published, sources

__all__ = ["PLAIN", "STAR", "Grid", "differences", "drawing", "html", "markdown", "scores"]

BLIND = "an answer that reads no text"
BOLD, STAR, DAGGER, PLAIN = "**{}**", "{} *", "{} †", "{}"  # how the best are marked, and what cannot be told from it
CAPTION = (
    "Primary metric of the last epoch in percent, mean ± standard deviation over the seeds. Bold: the best of its "
    "task, and whatever cannot be told from it."
)
INTERVALS = (
    f"Intervals are of a paired bootstrap over evaluation rows and seeds, {DRAWS} draws. With few seeds they are too "
    "narrow: they cannot know seeds that were not run."
)
PICTURE = "small: a seed; large: the mean; blue: the best and what cannot be told from it"


class Grid(NamedTuple):
    """What the finished cells of a grid found.

    Attributes:
      rows: {task: {variant: row}}, from `comparison.summarise`.
      finished: how many cells are done.
      total: of how many.
      baselines: {task: the score of an answer that reads no text}.
      unlike: what is not the same for all variants, beyond what they are compared in.
      published: {task: {variant: what others published}}, for a column of its own beside each task.
      metrics: {task: its primary metric}.
      reference: the variant that the rows are also held against; "" without one.
    """

    rows: Mapping[str, Mapping[str, Row]]
    finished: int
    total: int
    baselines: Mapping[str, float]
    unlike: Sequence[str] = ()
    published: Mapping[str, Mapping[str, Published]] = {}
    metrics: Mapping[str, str] = {}
    reference: str = ""


def scores(grid: Grid, mark: str = PLAIN) -> Table:
    """All tasks in one table, a row a variant.

    Args:
      grid: what it shows.
      mark: a format string for the best of each task and whatever cannot be told from it.
    """
    columns: list[tuple[str, Mapping[str, str], str]] = []
    for task, rows in grid.rows.items():
        columns.append(
            (
                f"{task} {grid.metrics.get(task, '')}".strip(),
                {name: _cell(row, mark) for name, row in rows.items()},
                f"{100 * grid.baselines[task]:.1f}",
            )
        )
        if theirs := grid.published.get(task):
            metrics = " or ".join(dict.fromkeys(row.metric for row in theirs.values()))
            columns.append((f"published {metrics}", {name: row.score for name, row in theirs.items()}, "-"))
    head = ("variant", "trainable %", "added %", *(head for head, *_ in columns))
    table = []
    for name in dict.fromkeys(name for rows in grid.rows.values() for name in rows):
        own = [rows[name] for rows in grid.rows.values() if name in rows]
        sizes = _span([row.trainable_percent for row in own]), _span([row.added_percent for row in own])
        table.append((name, *sizes, *(column.get(name, "-") for _, column, _ in columns)))
    return head, [*table, (BLIND, "0", "0", *(last for *_, last in columns))]


def _span(percents: Sequence[float]) -> str:
    """A size, or from which to which it is where it differs from task to task, as a choice or a head may."""
    least, most = f"{min(percents):.3f}", f"{max(percents):.3f}"
    return least if least == most else f"{least} to {most}"


def differences(grid: Grid, task: str) -> list[tuple[str, Table]]:
    """How far each variant of a task is behind the best, and from the reference, in points, each under a title."""
    rows = grid.rows[task]
    best, *_ = rows
    found = [(f"{task}: behind {best}", {name: (row.behind, row.interval) for name, row in rows.items()})]
    held = {name: row.against for name, row in rows.items() if row.against is not None and name != grid.reference}
    if held and grid.reference != best:
        found.append((f"{task}: against {grid.reference}", held))
    head = "variant", "points", f"{LEVEL} % interval", "seeds"
    return [
        (title, (head, [(name, *_points(*own), str(rows[name].num_seeds)) for name, own in table.items()]))
        for title, table in found
    ]


def _points(gap: float, ends: tuple[float, float]) -> tuple[str, str]:
    low, high = ends
    return f"{100 * gap:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


def markdown(grid: Grid, picture: str | None) -> str:
    """The page: the table of scores, then the differences from the best of each task and from the reference.

    Args:
      grid: what it shows.
      picture: file name of the picture, or None.
    """
    lines = ["# Comparison", ""]
    if grid.finished < grid.total:
        lines += [f"**{_finished(grid)}**", ""]
    lines += [CAPTION, "", formats.markdown(scores(grid, BOLD))]
    lines += ["", _credits(grid)] if grid.published else []
    lines += ["", *(f"**{text}**" for text in _warnings(grid))] if _warnings(grid) else []
    if picture:
        lines += ["", f"![Scores by task and variant]({picture})"]
    for task in grid.rows:
        for title, table in differences(grid, task):
            lines += ["", f"## {title}", "", formats.markdown(table)]
    return "\n".join([*lines, "", INTERVALS, ""])


def html(grid: Grid, outcomes: Sequence[Outcome], more: str = "") -> str:
    """The page in one file, with the pictures in it.

    Args:
      grid: what it shows.
      outcomes: of the runs, for the pictures.
      more: HTML to go below.
    """
    body = [document.warning(_finished(grid))] if grid.finished < grid.total else []
    body += [document.table(scores(grid, DAGGER)), document.paragraph(CAPTION.replace("Bold", "†"))]
    body += [document.paragraph(_credits(grid))] if grid.published else []
    body += [document.warning(text) for text in _warnings(grid)]
    body.append(document.figure(drawings.svg(*drawing(grid.rows, outcomes)), PICTURE))
    for task in grid.rows:
        for title, table in differences(grid, task):
            body += [document.heading(title), document.table(table)]
        body += _agreement([o for o in outcomes if o.task.name == task])
    return document.document("Comparison", "\n".join([*body, document.paragraph(INTERVALS), more]))


def _agreement(outcomes: Sequence[Outcome]) -> list[str]:
    """Which variants of a task err on the same rows, by the first seed of each."""
    firsts = {o.variant: o for o in reversed(outcomes)}
    if len(firsts) < 2 or any(o.labels.ndim > 1 or o.labels.dtype.kind != "i" for o in firsts.values()):
        return []  # of values and of tags there is no right and wrong row
    names = list(dict.fromkeys(o.variant for o in outcomes))
    wrong = np.stack([firsts[name].predictions != firsts[name].labels for name in names])
    text = "Agreement of the first seeds: of the rows that either variant has wrong, the share that both have."
    return [document.figure(drawings.matrix(answers.agreement(wrong), names, names), text)]


def _finished(grid: Grid) -> str:
    return f"{grid.finished} of {grid.total} cells are finished."


def _credits(grid: Grid) -> str:
    told = sources([row for rows in grid.published.values() for row in rows.values()])
    return f"Published by others, each with its own recipe: {'; '.join(told)}."


def _warnings(grid: Grid) -> list[str]:
    told = [f"Not alike: {each}." for each in grid.unlike]
    poor = [f"{n} on {t}" for t, rows in grid.rows.items() for n, row in rows.items() if row.mean <= grid.baselines[t]]
    return [*told, f"No better than an answer that reads no text: {', '.join(poor)}."] if poor else told


def _cell(row: Row, mark: str) -> str:
    text = f"{100 * row.mean:.1f}" + ("" if row.std is None else f" ± {100 * row.std:.1f}")
    return mark.format(text) if row.tied else text


def drawing(table: Mapping[str, Mapping[str, Row]], outcomes: Sequence[Outcome]) -> tuple[float, float, Draw]:
    """Width, height and picture: one panel a task, a row a variant, a small dot a seed and a large one for the mean."""
    most = max(map(len, table.values()))

    def draw(figure: Any) -> None:
        for panel, (task, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
            for i, (name, row) in enumerate(rows.items()):
                colour = drawings.COLOURS[0] if row.tied else "tab:gray"
                seeds = [100 * o.score() for o in outcomes if (o.task.name, o.variant) == (task, name)]
                panel.plot(seeds, [i] * len(seeds), ".", color=colour, alpha=0.5)
                panel.plot(100 * row.mean, i, "o", color=colour)
            panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
            panel.invert_yaxis()
            panel.set_title(task, fontsize=10)
            primary = next(o.task.primary for o in outcomes if o.task.name == task)
            panel.set_xlabel(f"{primary} in percent", fontsize=8)
            panel.grid(axis="x", alpha=0.3)
        figure.suptitle(PICTURE, fontsize=8)

    return 1.2 + 3.6 * len(table), 1.2 + 0.26 * most, draw
