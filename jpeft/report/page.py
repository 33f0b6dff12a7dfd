"""One HTML page about finished runs, in one file: tables that sort, pictures as SVG, nothing from the network."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.report import answers, document, drawings, tables

__all__ = ["Finished", "finished", "page"]

PREDICTIONS = "predictions.safetensors"


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
    return document.document(title, "\n".join(_body(runs)))


def _body(runs: Sequence[Finished]) -> Iterator[str]:
    reports = [run.report for run in runs]
    yield document.table(tables.table(reports, [run.name for run in runs]))
    yield document.paragraph(
        "Scores on the evaluation rows in percent, of the last epoch. A click on a column sorts by it."
    )
    for text in tables.differences(reports):
        yield document.warning(text)
    for run in runs:
        if text := tables.no_better(run.report):
            yield document.warning(f"{run.name}: {text}")
    for task, metric in dict.fromkeys((report["task"], report["primary_metric"]) for report in reports):
        own = [run for run in runs if (run.report["task"], run.report["primary_metric"]) == (task, metric)]
        yield document.heading(task)
        yield from _task(own)
    for run in runs:
        yield document.heading(run.name)
        yield from _run(run)


def _task(runs: Sequence[Finished]) -> Iterator[str]:
    """Pictures of all runs of one task."""
    metric = runs[0].report["primary_metric"]
    histories = {run.name: list(run.histories.values()) for run in runs}
    if max(len(rows) for seeds in histories.values() for rows in seeds) > 1:
        yield document.figure(
            drawings.curves(histories, metric), "By epoch: the mean over the seeds, and their deviation."
        )
    pictures = []
    classes = [run for run in runs if answers.is_classes(next(iter(run.logits.values())), run.truth)]
    if classes:
        found = {run.name: answers.reliability(*_all_seeds(run)) for run in classes}
        pictures.append(
            document.figure(drawings.reliability(found), "Calibration. On the dashed line, confidence is earned.")
        )
    alike = [run for run in classes if np.array_equal(run.truth, classes[0].truth)]
    if len(alike) > 1:
        wrong = np.stack([next(iter(run.logits.values())).argmax(-1) != run.truth for run in alike])
        names = [run.name for run in alike]
        text = "Agreement of the first seeds: of the rows that either run has wrong, the share that both have."
        pictures.append(document.figure(drawings.matrix(answers.agreement(wrong), names, names), text))
    yield f'<div class="side">{"".join(pictures)}</div>'


def _run(run: Finished) -> Iterator[str]:
    """What is of one run alone."""
    report, logits = run.report, next(iter(run.logits.values()))
    for text in report["warnings"]:
        yield document.warning(text)
    rows = [
        [str(row["seed"]), *(tables.percent(x) for x in row["last"].values())] for row in report["metrics"]["per_seed"]
    ]
    yield document.table((["seed", *report["metrics"]["mean"]], rows))
    if report["recipe"].get("export") == "best":
        yield document.paragraph(
            "The table is of the last epoch, pictures of answers are of the best one, which is saved."
        )
    if answers.is_classes(logits, run.truth):
        names = list(run.labels) or [str(i) for i in range(logits.shape[1])]
        text = "Labels by answers, all seeds together. Colours are shares of a label."
        yield document.figure(drawings.confusion(answers.confusion(*_all_seeds(run)), names), text)
    pictures = [("choice.png", "What each layer was chosen by.")]
    pictures += [(f"{path.parent.name}/{path.name}", "Mean Fisher information by layer and module.")
                 for path in sorted(run.workdir.glob("seed_*/fisher*.png"))]  # fmt: skip
    for name, text in pictures:
        if (run.workdir / name).is_file():
            data = base64.b64encode((run.workdir / name).read_bytes()).decode()
            yield document.figure(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">', text)
    if report["command"]:
        yield f"<pre>{html.escape(report['command'])}</pre>"


def _all_seeds(run: Finished) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(list(run.logits.values())), np.tile(run.truth, len(run.logits))
