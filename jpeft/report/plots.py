"""Pictures: Fisher information by layer and module, the scores of candidates and which one was kept, methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.site import layer_of, within_layer
from jpeft.plans.fishpal import Scores

__all__ = ["choice", "curves", "fisher_map", "methods", "race"]

DECADES = 6  # of Fisher information that a map tells apart


def choice(path: Path, by_seed: Mapping[int, Scores], kept: Mapping[int, Mapping[int, str]], title: str) -> None:
    """Writes a PNG: one heat map a seed, layers across, candidates down, with the kept candidate of each layer framed.

    Scores that are positive and span more than two decades, as mean squares do, are shown by their logarithm.

    Args:
      path: of the PNG.
      by_seed: the scores, {layer: {candidate: score}}.
      kept: by seed, {layer: candidate}; a layer that got nothing is not in it.
      title: stands above.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    first = next(iter(by_seed.values()))
    layers, candidates = list(first), list(next(iter(first.values())))
    tables = {
        seed: np.array([[scores[layer][name] for layer in layers] for name in candidates])
        for seed, scores in by_seed.items()
    }
    values = np.concatenate([table.ravel() for table in tables.values()])
    above = values[values > 0]
    log = bool(above.size) and (values >= 0).all() and above.max() > 100 * above.min()
    if log:
        tables = {
            seed: np.log10(table, out=np.full(table.shape, np.nan), where=table > 0) for seed, table in tables.items()
        }
        values = np.log10(above)
    low, high = values.min(), values.max()
    height = 0.9 + len(by_seed) * (0.5 * len(candidates) + 0.75)
    figure = Figure(figsize=(2.6 + 0.72 * len(layers), height), layout="constrained")
    panels = figure.subplots(len(by_seed), 1, squeeze=False)[:, 0]
    for panel, (seed, table) in zip(panels, tables.items(), strict=True):
        image = panel.imshow(table, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        for column, layer in enumerate(layers):
            for row, name in enumerate(candidates):
                best = kept[seed].get(layer) == name
                if best:
                    corner = (column - 0.47, row - 0.46)
                    panel.add_patch(Rectangle(corner, 0.94, 0.92, fill=False, edgecolor="crimson", linewidth=2.5))
                if np.isfinite(table[row, column]):
                    shade = (table[row, column] - low) / (high - low or 1)
                    panel.text(
                        column, row, f"{table[row, column]:.1f}" if log else f"{table[row, column]:.1e}", ha="center",
                        va="center", fontsize=8 if log else 7, color="black" if shade > 0.6 else "white",
                        fontweight="bold" if best else "normal",
                    )  # fmt: skip
        panel.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        panel.set_yticks(range(len(candidates)), candidates)
        panel.set_title(f"seed {seed}", fontsize=9, loc="left")
        panel.tick_params(length=0)
    panels[-1].set_xlabel("layer")
    figure.colorbar(image, ax=panels, label="log10 of score" if log else "score", shrink=0.9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def race(path: Path, by_seed: Mapping[int, Mapping[str, Any]], title: str) -> None:
    """Writes a PNG: one panel a seed, the held-out loss of each candidate over the steps that it trained.

    Args:
      path: of the PNG.
      by_seed: {"steps": of a round, "held_out_losses": [{candidate: loss} for each round], "scores": ...}, as a race
        finds them; the candidate with the highest score is drawn thick. Where rates raced, "rate", the one that was
        taken, and "rate_losses", {rate: loss of that candidate}, whose points are diamonds.
      title: stands above.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 3.4 * len(by_seed), 3.2), layout="constrained")
    panels = figure.subplots(1, len(by_seed), squeeze=False, sharey=True)[0]
    for panel, (seed, found) in zip(panels, by_seed.items(), strict=True):
        scores = next(iter(found["scores"].values()))
        winner = max(scores, key=scores.__getitem__)
        for name in scores:
            losses = [row[name] for row in found["held_out_losses"] if name in row]
            if not losses:
                continue  # the run was too short for a race of kinds
            steps = [found["steps"] * (i + 1) for i in range(len(losses))]
            chosen = name == winner
            label = f"{name} (chosen)" if chosen else name
            if len(found["held_out_losses"][0]) == 1 and "rate" in found:
                label = f"{name}, its own rate" + (" (taken)" if found["rate"] == 1 else "")
            panel.plot(steps, losses, "o-", linewidth=3 if chosen else 1, label=label, zorder=3 if chosen else 2)
        end = found["steps"] * len(found["held_out_losses"])
        for rate, loss in list(found.get("rate_losses", {}).items())[1:]:  # the first one's is on the line
            taken = " (taken)" if float(rate) == found["rate"] else ""
            panel.plot(end, loss, "D", label=f"{winner}, {rate} times its rate{taken}")
        panel.set_xlim(left=0)
        panel.set_title(f"seed {seed}", fontsize=9, loc="left")
        panel.set_xlabel("steps", fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("held-out loss")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def fisher_map(path: Path, information: Mapping[str, np.ndarray], title: str) -> None:
    """Writes a PNG: layers across, modules down, colour by the logarithm of the mean Fisher information of an entry.

    What is in no layer has a column of its own on the left. Modules without information are left white. What is more
    than `DECADES` below the highest has the lowest colour.

    Args:
      path: of the PNG.
      information: Fisher information by the paths of leaves, joined by ":" or "/", as `jpeft.run.measured.read`
        gives it.
      title: stands above.
    """
    from matplotlib.figure import Figure

    sums: dict[tuple[str, int], np.ndarray] = {}
    for name, x in information.items():
        where = name.replace(":", "/")
        layer = layer_of(where)
        module = within_layer(where)
        place = (module.removeprefix("params/").removesuffix("/values"), -1 if layer is None else layer)
        sums[place] = sums.get(place, np.zeros(2)) + np.array([np.sum(x, dtype=np.float64), np.size(x)])
    modules = list(dict.fromkeys(module for module, _ in sums))
    columns = sorted({layer for _, layer in sums})
    table = np.full((len(modules), len(columns)), np.nan)
    for (module, layer), (total, size) in sums.items():
        table[modules.index(module), columns.index(layer)] = total / size if total > 0 else np.nan
    figure = Figure(figsize=(4.2 + 0.42 * len(columns), 1.2 + 0.22 * len(modules)), layout="constrained")
    panel = figure.subplots()
    colours = np.log10(table)
    # Rounding error, such as the key biases have in place of 0, would take up most of the scale.
    highest = np.nanmax(colours, initial=-np.inf)
    least = np.nanmin(colours, initial=np.inf)
    lowest = max(highest - DECADES, least) if np.isfinite(highest) else None
    image = panel.imshow(colours, cmap="viridis", aspect="auto", vmin=lowest)
    panel.set_xticks(range(len(columns)), ["-" if layer < 0 else str(layer) for layer in columns])
    panel.set_yticks(range(len(modules)), modules, fontsize=7)
    panel.tick_params(length=0)
    panel.set_xlabel("layer")
    figure.colorbar(
        image,
        ax=panel,
        label="log10 of mean Fisher information",
        shrink=0.9,
        extend="min" if lowest is not None and lowest > least else "neither",
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def methods(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a PNG: the mean score of each method, with its range, over the share of parameters that it trains.

    Args:
      path: of the PNG.
      rows: by method, as `jpeft.workbench.methods` measures them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel = figure.subplots()
    primary = ""
    for name, row in rows.items():
        if "scores" not in row:
            continue
        primary, scores = row["primary_metric"], [100 * value for value in row["scores"].values()]
        # The head alone trains nothing of the base: it stands at the left edge of a logarithmic axis.
        share, value = max(row["trainable_percent"], 1e-3), sum(scores) / len(scores)
        colour = "tab:blue" if row["merges"] else "tab:orange"
        panel.plot(share, value, "o", color=colour)
        panel.plot([share, share], [min(scores), max(scores)], "-", color=colour, linewidth=1)
        panel.annotate(name, (share, value), xytext=(4, 4), textcoords="offset points", fontsize=8)
    panel.set_xscale("log")
    panel.set_xlabel("trained share of bert-base in percent, without the head (blue: merges into the base)")
    panel.set_ylabel(f"{primary} in percent")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def curves(
    path: Path, histories: Mapping[int, Sequence[Mapping[str, float]]], primary: str, baseline: float, title: str
) -> None:
    """Writes a PNG: the training loss and the score after every epoch, one line a seed.

    Args:
      path: of the PNG.
      histories: by seed, a row for every epoch with "epoch", "train_loss" and the scores.
      primary: the score to show.
      baseline: what an answer scores that reads no text.
      title: stands above.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.4))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.15, top=0.88, wspace=0.22)  # layouts by search take longer
    losses, scores = figure.subplots(1, 2)
    for seed, rows in histories.items():
        epochs = [row["epoch"] for row in rows]
        losses.plot(epochs, [row["train_loss"] for row in rows], "o-", markersize=3, label=f"seed {seed}")
        scores.plot(epochs, [100 * row[primary] for row in rows], "o-", markersize=3, label=f"seed {seed}")
    scores.axhline(100 * baseline, color="grey", linestyle="--", linewidth=1, label="without reading")
    losses.set_ylabel("mean training loss of the epoch")
    scores.set_ylabel(f"{primary} in percent")
    for panel in (losses, scores):
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    scores.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
