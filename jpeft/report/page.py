"""One HTML page about finished runs, in one file: tables that sort, pictures as SVG, nothing from the network."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.report import answers, drawings, tables
from jpeft.report.formats import Table

__all__ = ["Finished", "finished", "page"]

PREDICTIONS = "predictions.safetensors"

STYLE = """
:root { color-scheme: light; --line: #ccc; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
figure { margin: .8rem 0; } figure svg, figure img { max-width: 100%; height: auto; } figcaption { color: #555; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
.warning { border-left: 4px solid #D55E00; padding-left: .7rem; }
@media print { body { max-width: none; font-size: 10pt; } figure, table { break-inside: avoid; } }
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], i = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[i].textContent.trim(), number = text => parseFloat(text.replaceAll(",", ""));
  const order = (a, b) => isNaN(number(a)) || isNaN(number(b))
    ? (isNaN(number(a)) - isNaN(number(b))) || a.localeCompare(b) : number(b) - number(a);
  const rows = [...body.rows].sort((a, b) => order(value(a), value(b)));
  body.append(...(down ? rows : rows.reverse()));
};
"""


class Finished(NamedTuple):
    """What a finished run left.

    Attributes:
      name: of its workdir.
      workdir: where it is.
      report: of `report.json`.
      labels: names of the classes.
      histories: by seed, one row an epoch.
      logits: by seed, of the evaluation rows.
      truth: their labels.
    """

    name: str
    workdir: Path
    report: Mapping[str, Any]
    labels: Sequence[str]
    histories: Mapping[int, Sequence[Mapping[str, Any]]]
    logits: Mapping[int, np.ndarray]
    truth: np.ndarray


def finished(workdir: Path, name: str) -> Finished:
    """Reads what a run left.

    Raises:
      UserError: if a file is missing, was changed, or is of another kind.
    """
    report = files.read_record(workdir / "report.json", tables.REPORT)
    seeds = [row["seed"] for row in report["metrics"]["per_seed"]]
    folders = {seed: workdir / f"seed_{seed}" for seed in seeds}
    results = {
        seed: files.read_record(folder / "result.json", "result of one seed") for seed, folder in folders.items()
    }
    arrays = {seed: files.read_leaves(folder / PREDICTIONS) for seed, folder in folders.items()}
    labels = files.read_record(workdir / "inputs.json", "list of a run's inputs")["labels"]
    truth = np.asarray(arrays[seeds[0]]["labels"])
    return Finished(
        name,
        workdir,
        report,
        labels,
        {seed: found["history"] for seed, found in results.items()},
        {seed: np.asarray(found["logits"]) for seed, found in arrays.items()},
        truth,
    )


def page(runs: Sequence[Finished]) -> str:
    """The page.

    Raises:
      UserError: if there are no runs.
    """
    if not runs:
        raise UserError("a page needs at least one finished run")
    title = "Comparison of runs" if len(runs) > 1 else f"{runs[0].report['method']} on {runs[0].report['task']}"
    body = "\n".join(_body(runs))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}\n<script>{SORT}</script>\n</html>\n"
    )


def _body(runs: Sequence[Finished]) -> Iterator[str]:
    reports = [run.report for run in runs]
    yield _table(tables.table(reports))
    yield "<p>Scores on the evaluation rows in percent, of the last epoch. A click on a column sorts by it.</p>"
    for text in tables.differences(reports):
        yield _warning(text)
    for run in runs:
        if text := tables.no_better(run.report):
            yield _warning(f"{run.name}: {text}")
    for task in dict.fromkeys(report["task"] for report in reports):
        own = [run for run in runs if run.report["task"] == task]
        yield f"<h2>{html.escape(task)}</h2>"
        yield from _task(own)
    for run in runs:
        yield f"<h2>{html.escape(run.name)}</h2>"
        yield from _run(run)


def _task(runs: Sequence[Finished]) -> Iterator[str]:
    """Pictures of all runs of one task."""
    metric = runs[0].report["primary_metric"]
    histories = {run.name: list(run.histories.values()) for run in runs}
    if max(len(rows) for seeds in histories.values() for rows in seeds) > 1:
        yield _figure(drawings.curves(histories, metric), "By epoch: the mean over the seeds, and their deviation.")
    pictures = []
    classes = [run for run in runs if answers.is_classes(next(iter(run.logits.values())), run.truth)]
    if classes:
        found = {run.name: answers.reliability(*_all_seeds(run)) for run in classes}
        pictures.append(_figure(drawings.reliability(found), "Calibration. On the dashed line, confidence is earned."))
    alike = [run for run in classes if np.array_equal(run.truth, classes[0].truth)]
    if len(alike) > 1:
        wrong = np.stack([next(iter(run.logits.values())).argmax(-1) != run.truth for run in alike])
        names = [run.name for run in alike]
        text = "Agreement of the first seeds: of the rows that either run has wrong, the share that both have."
        pictures.append(_figure(drawings.matrix(answers.agreement(wrong), names, names), text))
    yield f'<div class="side">{"".join(pictures)}</div>'


def _run(run: Finished) -> Iterator[str]:
    """What is of one run alone."""
    report, logits = run.report, next(iter(run.logits.values()))
    for text in report["warnings"]:
        yield _warning(text)
    rows = [
        [str(row["seed"]), *(tables.percent(x) for x in row["last"].values())] for row in report["metrics"]["per_seed"]
    ]
    yield _table((["seed", *report["metrics"]["mean"]], rows))
    if answers.is_classes(logits, run.truth):
        names = list(run.labels) or [str(i) for i in range(logits.shape[1])]
        text = "Labels by answers, all seeds together. Colours are shares of a label."
        yield _figure(drawings.confusion(answers.confusion(*_all_seeds(run)), names), text)
    pictures = [("choice.png", "What each layer was chosen by.")]
    pictures += [(f"{path.parent.name}/{path.name}", "Mean Fisher information by layer and module.")
                 for path in sorted(run.workdir.glob("seed_*/fisher*.png"))]  # fmt: skip
    for name, text in pictures:
        if (run.workdir / name).is_file():
            data = base64.b64encode((run.workdir / name).read_bytes()).decode()
            yield _figure(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">', text)
    if report["command"]:
        yield f"<pre>{html.escape(report['command'])}</pre>"


def _all_seeds(run: Finished) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(list(run.logits.values())), np.tile(run.truth, len(run.logits))


def _table(table: Table) -> str:
    head, rows = table
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    lines = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def _figure(picture: str, text: str) -> str:
    return f"<figure>{picture}<figcaption>{html.escape(text)}</figcaption></figure>"


def _warning(text: str) -> str:
    return f'<p class="warning">{html.escape(text)}</p>'
