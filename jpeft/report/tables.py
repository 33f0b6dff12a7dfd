"""The report of a run: one dict that a program parses, one page of Markdown that a person reads."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.core.files import Kind
from jpeft.report import formats

__all__ = [
    "REPORT",
    "average",
    "compare",
    "differences",
    "markdown",
    "no_better",
    "percent",
    "plan_lines",
    "saved",
    "spread",
    "table",
]  # fmt: skip

# The record report.json. An entry that only the page shows need not be here: the page is made with the report.
REPORT = Kind(
    "report of a run",
    {
        "task": str, "method": str, "model": str, "split": str, "primary_metric": str, "command": str | None,
        "metrics": {
            "mean": dict[str, float], "std": dict[str, float | None],
            "per_seed": [{"seed": int, "last": dict[str, float]}],
        },
        "baseline": {"answer": str, "metrics": dict[str, float]},
        "examples": {"train": int, "evaluation": int},
        "recipe": {"num_epochs": int},
        "data": dict[str, str] | None,
        "parameters": {"trainable_percent": float, "added_percent": float},
        "examples_per_second": float,
    },
)  # fmt: skip

_COUNTS = {
    "base": "base parameters (encoder and pooler)",
    "head": "head parameters",
    "trainable": "trainable parameters (modules and head)",
    "added_at_inference": "added at inference (modules, folded and merged)",
}


def spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (ddof 1) of each metric over seeds; the deviation of one seed is None."""
    names = list(rows[0])
    return {
        "mean": {name: statistics.fmean(row[name] for row in rows) for name in names},
        "std": {name: statistics.stdev(row[name] for row in rows) if len(rows) > 1 else None for name in names},
    }


def saved(report: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of what a run saved of a seed: of the last epoch, or the best if `config.train.export` says so.

    Args:
      report: of the run.
      row: the seed's, one of its `metrics.per_seed`.
    """
    kept = "best" if report["recipe"].get("export") == "best" else "last"
    return {name: row[kept][name] for name in row["last"]}


def average(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry over seeds, whose plans may differ in size; whole where all agree."""
    same = {name: len({row[name] for row in rows}) == 1 for name in rows[0]}
    return {name: rows[0][name] if same[name] else statistics.fmean(row[name] for row in rows) for name in rows[0]}


def percent(value: float) -> str:
    """A fraction as a percentage with two digits."""
    return f"{100 * value:.2f}"


def plan_lines(plan: Mapping[int, Sequence[Any]]) -> list[str]:
    """ "0-1 prefix", "2 lora(rank=4)", ...: neighbouring layers with the same modules together."""
    runs: list[tuple[int, int, str]] = []
    for layer in sorted(plan):
        text = " + ".join(_entry(entry) for entry in plan[layer])
        if runs and runs[-1][2] == text and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer, text)
        else:
            runs.append((layer, layer, text))
    return [f"{first} {text}" if first == last else f"{first}-{last} {text}" for first, last, text in runs]


def _entry(entry: Any) -> str:
    given = ", ".join(f"{name}={value}" for name, value in entry.options.items())
    return f"{entry.method}({given})" if given else entry.method


def markdown(
    report: Mapping[str, Any],
    plans: Mapping[int, Mapping[int, Sequence[Any]]],
    summaries: Mapping[int, str],
    picture: str | None,
    maps: Sequence[str] = (),
    curves: str | None = None,
) -> str:
    """The page.

    Args:
      report: what goes into `report.json`.
      plans: by seed, for FishPAL.
      summaries: by seed, the Markdown table of what trains and what stays.
      picture: file name of the picture of the scores, or None.
      maps: file names of pictures of Fisher information by layer and module.
      curves: file name of the picture of losses and scores by epoch, or None.
    """
    lines = [f"# {report['method']} on {report['task']} ({report['model']})", "", *_scores(report)]
    if report["other_splits"]:
        lines += ["", *_other_splits(report)]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {text}" for text in report["warnings"])]
    if curves:
        lines += ["", f"![Training loss and score by epoch]({curves})"]
    if plans:
        lines += ["", "## Which module each layer got", ""]
        lines += [f"- seed {seed}: layers " + "; ".join(plan_lines(plan)) for seed, plan in plans.items()]
        if "choice" in report:
            cost = report["choice"]
            lines += ["", f"Chosen by `{cost['criterion']}`, at {100 * cost['share']:.1f} % of the training's passes."]
            if len(cost.get("raced", ())) == 1:
                lines[-1] += f" It was too short to tell kinds of modules apart: {cost['raced'][0]} is named first."
            if "rates" in cost:
                told = ", ".join(f"{rate:g} times (seed {seed})" for seed, rate in cost["rates"].items())
                lines[-1] += f" The race also chose a multiple of the learning rate below: {told}."
        if picture:
            race = report.get("choice", {}).get("criterion") == "race"
            shows = "Held-out losses of the candidates" if race else "Scores by layer and candidate, the chosen framed"
            lines += ["", f"![{shows}]({picture})"]
    if maps:
        lines += ["", "## Where the Fisher information is", ""]
        lines += [f"![Mean Fisher information by layer and module]({name})" for name in maps]
    lines += ["", "## What trains and what stays at inference", ""]
    alike = len(set(summaries.values())) == 1
    for seed, text in list(summaries.items())[: 1 if alike else None]:
        lines += [text] if alike else [f"Seed {seed}:", "", text, ""]
    return "\n".join([*lines, "", *_recipe(report), "", *_costs(report), ""])


def _scores(report: Mapping[str, Any]) -> list[str]:
    metrics, split = report["metrics"], report["split"]
    names = list(metrics["mean"])
    saved = "the best epoch is saved" if report["recipe"].get("export") == "best" else "which is saved"
    lines = [f"Scores on the {split} split, in percent, of the last epoch, {saved}; best in brackets.", ""]
    lines += ["| seed | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in metrics["per_seed"]:
        cells = (f"{percent(row['last'][name])} ({percent(row['best'][name])})" for name in names)
        lines.append(f"| {row['seed']} | " + " | ".join(cells) + " |")
    if len(metrics["per_seed"]) > 1:
        cells = (f"{percent(metrics['mean'][name])} ± {percent(metrics['std'][name])}" for name in names)
        lines.append("| **mean ± std** | " + " | ".join(cells) + " |")
    cells = (percent(report["baseline"]["metrics"][name]) for name in names)
    lines.append(f"| {report['baseline']['answer']} | " + " | ".join(cells) + " |")
    return lines + (["", f"**{text}**"] if (text := no_better(report)) else [])


def _other_splits(report: Mapping[str, Any]) -> list[str]:
    names = list(report["metrics"]["mean"])
    lines = ["Scores of what is saved on other splits, in percent, by which nothing was chosen.", ""]
    lines += ["| split | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for split, found in report["other_splits"].items():
        means = {name: percent(found["mean"][name]) for name in names}
        spreads = {name: "" if found["std"][name] is None else f" ± {percent(found['std'][name])}" for name in names}
        lines.append(f"| {split} | " + " | ".join(means[name] + spreads[name] for name in names) + " |")
    return lines


def _recipe(report: Mapping[str, Any]) -> list[str]:
    recipe, examples = report["recipe"], report["examples"]
    lines = ["## How it was made", "", "| | |", "| --- | ---: |"]
    lines += [f"| {kind} examples | {n:,} |" for kind, n in examples.items()]
    rates = report.get("learning_rates") or {"": report["learning_rate"]}
    lines += [f"| learning rate{f' of {name}' if name else ''} | {rate:g} |" for name, rate in rates.items()]
    lines += [f"| {name.replace('_', ' ')} | {'no' if value is None else value} |" for name, value in recipe.items()]
    lines += [f"| device | {report['device']} |"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += ["", f"Made by {versions}" + (":" if report["command"] else ".")]
    return lines + (["", f"    {report['command']}"] if report["command"] else [])


def _costs(report: Mapping[str, Any]) -> list[str]:
    counts = report["parameters"]
    lines = ["## What it costs", "", "| | |", "| --- | ---: |"]
    lines += [f"| {text} | {counts[name]:,.0f} |" for name, text in _COUNTS.items()]
    lines += [
        f"| trainable, of base and head | {counts['trainable_percent']:.2f} % |",
        f"| added at inference, of base and head | {counts['added_percent']:.2f} % |",
        f"| file of the trained modules | {counts['module_bytes'] / 1e6:.2f} MB |",
        f"| training | {report['examples_per_second']:.1f} examples/s |",
        f"| evaluation | {report['inference_examples_per_second']:.1f} examples/s |",
        f"| peak memory of the process, earlier runs included | {report['peak_memory_bytes'] / 1e9:.2f} GB |",
    ]
    return lines + [f"| seconds: {name} | {value:.1f} |" for name, value in report["seconds"].items()]


def no_better(report: Mapping[str, Any]) -> str:
    """A sentence if the run does no better than an answer that reads no text; "" otherwise."""
    name = report["primary_metric"]
    mean, baseline = report["metrics"]["mean"][name], report["baseline"]["metrics"][name]
    if mean > baseline + 1e-9:  # a mean of equal scores may be larger by rounding
        return ""
    answer = report["baseline"]["answer"]
    return f"No better than always answering the {answer}: {name} {percent(mean)} against {percent(baseline)}."


def compare(reports: Sequence[Mapping[str, Any]], called: Sequence[str] = ()) -> str:
    """A Markdown table of several runs, as `table`. Below it stands in what they differ that should be alike."""
    told = differences(reports)
    return "\n".join([formats.markdown(table(reports, called)), *(["", *told] if told else [])])


def table(reports: Sequence[Mapping[str, Any]], called: Sequence[str] = ()) -> formats.Table:
    """Several runs, one row each: scores in percent, sizes and speed.

    The first row of a task is what an answer scores that reads no text.

    Args:
      reports: of the runs.
      called: what the runs are called, which tells those of one method, task and model apart.
    """
    whose = [(report["method"], report["task"], report["model"]) for report in reports]
    names = list(dict.fromkeys(name for report in reports for name in report["metrics"]["mean"]))
    head = ["method", "task", "model", *names, "trainable %", "added %", "train examples/s"]
    rows: list[list[str]] = []
    for i, report in enumerate(reports):
        mean, std, counts = report["metrics"]["mean"], report["metrics"]["std"], report["parameters"]
        answer, scores = report["baseline"]["answer"], report["baseline"]["metrics"]
        baseline = [answer, report["task"], "", *(_cell(scores.get(name), None) for name in names), "", "", ""]
        if baseline not in rows:
            rows.append(baseline)
        alike = called and whose.count(whose[i]) > 1
        cells = [f"{report['method']}, {called[i]}" if alike else report["method"], report["task"], report["model"]]
        cells += [_cell(mean.get(name), std.get(name)) for name in names]
        cells += [f"{counts['trainable_percent']:.2f}", f"{counts['added_percent']:.2f}"]
        rows.append([*cells, f"{report['examples_per_second']:.1f}"])
    return head, rows


RECIPE = (
    "batch_size", "max_length", "dtype", "warmup_ratio", "weight_decay", "group_by_length", "cache_frozen_layers",
    "quantise", "init_from",
)  # fmt: skip


def differences(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """In what runs differ that should be alike for their scores to be compared: no line, or one."""
    found = {
        "task": [report["task"] for report in reports],
        "model": [report["model"] for report in reports],
        "training examples": [f"{report['examples']['train']:,}" for report in reports],
        "evaluation examples": [f"{report['examples']['evaluation']:,}" for report in reports],
        "epochs": [str(report["recipe"]["num_epochs"]) for report in reports],
        "seeds": [str(len(report["metrics"]["per_seed"])) for report in reports],
    }
    for name in RECIPE:  # of which earlier versions left out some
        found[name] = [str(report["recipe"].get(name) or "no") for report in reports]
    # Of the same task and size, and yet others: the user's own files may all be called "custom".
    data: dict[str, set[tuple[str, ...]]] = {}
    for report in reports:
        if report.get("data"):  # which earlier versions left out
            data.setdefault(report["task"], set()).add(tuple(report["data"].values()))
    other = [task for task, seen in data.items() if len(seen) > 1]
    told = [f"the data of {task}" for task in other]
    told += [f"{name} ({', '.join(dict.fromkeys(values))})" for name, values in found.items() if len(set(values)) > 1]
    return [f"Not alike, so compare with care: {'; '.join(told)}."] if told else []


def _cell(mean: float | None, std: float | None) -> str:
    if mean is None or math.isnan(mean):
        return "-"
    return percent(mean) if std is None else f"{percent(mean)} ± {percent(std)}"
