"""Pictures of finished runs as SVG, for a page: they stay sharp in print, and their colours differ for everyone.

The colours are those of Okabe and Ito (2008), and cividis, which reads alike with any colour vision.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.report.answers import Reliability

__all__ = ["COLOURS", "Draw", "confusion", "curves", "matrix", "png", "reliability", "svg"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Draw = Callable[[Any], None]  # draws on a Matplotlib figure


def svg(width: float, height: float, draw: Draw) -> str:
    """The SVG element of a figure of this size in inches, the same for the same picture."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jpeft", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]


def png(path: Path, width: float, height: float, draw: Draw) -> None:
    """Writes a figure of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=130)


def curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str) -> str:
    """Training loss and score by epoch, a colour for each run: the mean of its seeds, and a band of their deviation.

    Args:
      histories: {run: for each seed its epochs, with "epoch", "train_loss" and the metric}.
      metric: the score to show.
    """

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2)
        for i, (name, seeds) in enumerate(histories.items()):
            colour = COLOURS[i % len(COLOURS)]
            last = min(map(len, seeds))
            for panel, key, factor in zip(panels, ("train_loss", metric), (1, 100), strict=True):
                epochs = [row["epoch"] for row in seeds[0][:last]]
                values = factor * np.array([[row[key] for row in rows[:last]] for rows in seeds])
                mean = values.mean(0)
                panel.plot(epochs, mean, "o-", color=colour, markersize=3, label=name)
                if len(seeds) > 1:
                    spread = values.std(0, ddof=1)
                    panel.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        for panel, label in zip(panels, ("mean training loss", f"{metric} in percent"), strict=True):
            panel.set_xlabel("epoch")
            panel.set_ylabel(label)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        panels[1].legend(fontsize=8)

    return svg(9, 3.2, draw)


def confusion(table: np.ndarray, labels: Sequence[str]) -> str:
    """Counts [C, C] of labels by answers; colours are shares of each label."""
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    return matrix(shares, labels, labels, table, "answer", "label")


def matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    numbers: np.ndarray | None = None,
    across: str = "",
    down: str = "",
) -> str:
    """A heat map of values from 0 to 1, with a number in every cell, unless there are more than 12 columns.

    Args:
      values: [r, c].
      rows: their names.
      columns: their names.
      numbers: what is written in the cells, if not the values.
      across: what the columns are.
      down: what the rows are.
    """

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        panel.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 6 else 0, ha="right")
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel(across)
        panel.set_ylabel(down)
        panel.tick_params(length=0)
        for (i, j), value in np.ndenumerate(values if len(columns) <= 12 else np.zeros((0, 0))):
            text = f"{value:.2f}" if numbers is None else f"{numbers[i, j]:,}"
            panel.text(j, i, text, ha="center", va="center", color="black" if value > 0.55 else "white")

    longest = max(map(len, rows))
    return svg(1.2 + 0.07 * longest + 0.62 * len(columns), 1.1 + 0.42 * len(rows), draw)


def reliability(found: Mapping[str, Reliability]) -> str:
    """Accuracy by confidence, a line for each run; on the diagonal, confidence is earned. Points show their share."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        for i, (name, one) in enumerate(found.items()):
            colour, label = COLOURS[i % len(COLOURS)], f"{name} (ECE {100 * one.error:.1f} %)"
            panel.plot(one.confidence, one.accuracy, color=colour, linewidth=1, label=label)
            panel.scatter(one.confidence, one.accuracy, s=8 + 150 * one.share, color=colour, alpha=0.7, linewidths=0)
        lowest = min(float(one.confidence.min()) for one in found.values())
        panel.set_xlim(max(0.0, lowest - 0.03), 1.01)
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("confidence of the answer")
        panel.set_ylabel("share that is right")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper left")

    return svg(4.6, 3.6, draw)
