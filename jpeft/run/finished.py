"""What is left in the workdir of a finished run for people and programs: report.json, report.md and the picture."""

import json
import platform
import resource
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import flax
import jax

from jpeft.core import files, tree
from jpeft.core.errors import UserError
from jpeft.core.summary import Summary
from jpeft.data.task import Data
from jpeft.models import Bert
from jpeft.plans import fishpal
from jpeft.plans import plan as plans
from jpeft.plans.plan import Plan
from jpeft.report import plots, tables
from jpeft.run import config as configs
from jpeft.run.choose import CHOICE
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.workdir import INPUTS, INPUTS_KIND
from jpeft.version import __version__

__all__ = ["Result", "count", "peak_memory", "read", "save", "write"]

PICTURE, CURVES = "choice.png", "curves.png"
RECIPE = (
    "num_epochs", "batch_size", "max_length", "dtype", "warmup_ratio", "weight_decay", "export", "group_by_length",
    "cache_frozen_layers",
)  # fmt: skip


class Result(NamedTuple):
    """What one seed gives, JSON throughout; cached in `seed_<n>/result.json`.

    Attributes:
      history: one row an epoch.
      summary: the table of what trains and what stays, in Markdown.
      parameters: as in `report.json`.
      seconds: by kind of work, over all starts of the run.
      train_examples: examples trained on, epochs counted.
      dev_examples: likewise for evaluation.
      peak_memory_bytes: of the accelerator, or of the process on CPU.
      warnings: of this seed.
      owner: of `jpeft.run.workdir.owner`.
      files: hashes of what else the seed left, by name.
      others: scores on further splits with labels, by split and metric.
    """

    history: list[dict[str, Any]]
    summary: str
    parameters: dict[str, Any]
    seconds: dict[str, float]
    train_examples: int
    dev_examples: int
    peak_memory_bytes: int
    warnings: list[str]
    owner: str
    files: dict[str, str]
    others: dict[str, dict[str, float]]


RESULT = files.Kind(
    "result of one seed",
    {
        **get_type_hints(Result),
        "history": [{"step": int, "epoch": int}],
        "parameters": dict[str, float],
        "seconds": {"train": float, "evaluate": float},
    },
)


def save(path: Path, result: Result) -> None:
    """Writes the result of one seed."""
    files.write_record(path, RESULT, result._asdict())


def read(path: Path) -> Result:
    """The inverse of `save`.

    Raises:
      UserError: if the file is not such a result, or was changed.
    """
    found = files.read_record(path, RESULT)
    if set(found) != set(Result._fields) or not found["history"]:
        raise UserError(f"{path} is not a {RESULT.name} of this version of jpeft")
    return Result(**found)


def write(
    config: Config,
    data: Data,
    results: dict[int, Result],
    seconds: dict[str, float],
    workdir: Path,
    console: Console,
    command: str | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes `report.json`, `report.md` and the picture, prints the table, and returns what `report.json` holds.

    Args:
      config: of the run.
      data: that it trained and was evaluated on.
      results: by seed.
      seconds: besides those of the seeds.
      workdir: where to write.
      console: where to print.
      command: the command line that made the run, if there was one.
      warnings: of the run, besides those of the seeds.
    """
    folders = {seed: workdir / f"seed_{seed}" for seed in results}
    chosen = {seed: plans.read(str(f / "plan.json")) for seed, f in folders.items() if (f / "plan.json").is_file()}
    choices = {seed: files.read_record(p, CHOICE) for seed, f in folders.items() if (p := f / "choice.json").is_file()}
    inputs = files.read_record(workdir / INPUTS, INPUTS_KIND)
    report = _report(config, data, results, inputs) | {
        "seconds": {**seconds, **_spent(results)},
        "warnings": list(dict.fromkeys([*warnings, *(w for r in results.values() for w in r.warnings)])),
        "command": command,
    }
    if choices:
        report["choice"] = _choice(config, choices)
        _draw_choice(workdir / PICTURE, config, choices, chosen)
    if factors := configs.rates(config):  # each kind of module has its own
        kinds = sorted({entry.method for plan in chosen.values() for entries in plan.values() for entry in entries})
        report["learning_rates"] = {name: report["learning_rate"] * factors[name] for name in kinds}
    files.write_record(workdir / "report.json", tables.REPORT, report)
    curves = CURVES if config.train.num_epochs > 1 else None
    if curves is not None:
        histories = {seed: result.history for seed, result in results.items()}
        baseline = report["baseline"]["metrics"][data.task.primary]
        title = f"{config.method} on {config.task}, {config.model}"
        plots.curves(workdir / curves, histories, data.task.primary, baseline, title)
    summaries = {seed: result.summary for seed, result in results.items()}
    maps = [f"{f.name}/{path.name}" for f in folders.values() for path in sorted(f.glob("fisher*.png"))]
    page = tables.markdown(report, chosen, summaries, PICTURE if choices else None, maps, curves)
    files.write_text(workdir / "report.md", page)
    console.say()
    console.say(tables.compare([report]))
    if tables.no_better(report):
        console.warn(tables.no_better(report))
    console.say(f"\nreport: {workdir / 'report.md'}; modules: {workdir}/seed_{config.seeds[0]}/model")
    return report


def _report(config: Config, data: Data, results: Mapping[int, Result], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `report.json` holds of the results, the data and the machine."""
    task, per_seed, spent = data.task, [], _spent(results)
    for seed, result in results.items():
        last = {name: result.history[-1][name] for name in task.metrics}
        best = max(result.history, key=lambda row: row[task.primary])
        row = {"seed": seed, "last": last, "best": {name: best[name] for name in ("epoch", *task.metrics)}}
        per_seed.append(row | ({"plan": f"seed_{seed}/plan.json"} if configs.first_method(config).chooses else {}))
    return {
        "task": task.name,
        "method": config.method,
        "model": config.model,
        "split": task.eval_split,
        "primary_metric": task.primary,
        "metrics": {**tables.spread([row["last"] for row in per_seed]), "per_seed": per_seed},
        "other_splits": {name: tables.spread([r.others[name] for r in results.values()]) for name in data.others},
        "baseline": {
            "answer": task.answers.guess_name,
            "metrics": task.baseline(data.train.labels, data.dev.labels),
        },
        "data": {name: inputs[name][1] for name in ("train", "dev")},
        "examples": {"train": data.train.size, "evaluation": data.dev.size},
        "recipe": {
            **{name: config.train[name] for name in RECIPE},
            "dtype": configs.dtype(config),
            "quantise": config.quantise,
            "init_from": config.init_from,
        },
        "parameters": tables.average([result.parameters for result in results.values()]),
        "examples_per_second": sum(r.train_examples for r in results.values()) / spent["train"],
        "inference_examples_per_second": sum(r.dev_examples for r in results.values()) / spent["evaluate"],
        "peak_memory_bytes": max(result.peak_memory_bytes for result in results.values()),
        "learning_rate": configs.learning_rate(config),
        "device": jax.local_devices()[0].device_kind,
        "versions": {"jpeft": __version__, "jax": jax.__version__, "flax": flax.__version__},
    }


def _spent(results: Mapping[int, Result]) -> dict[str, float]:
    """Seconds by kind of work, over all seeds."""
    return {name: sum(r.seconds[name] for r in results.values()) for name in next(iter(results.values())).seconds}


def _choice(config: Config, choices: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What the choices of all seeds took, and the multiples of the learning rate that they found."""
    costs = {name: statistics.fmean(found[name] for found in choices.values()) for name in ("passes", "share")}
    found = {"criterion": config.fishpal.criterion, **costs, "seconds": sum(c["seconds"] for c in choices.values())}
    if config.fishpal.criterion == "race":
        found["raced"] = _raced(choices)
    if any("rate" in each for each in choices.values()):
        found["rates"] = {str(seed): each.get("rate", 1) for seed, each in choices.items()}
    return found


def _raced(choices: Mapping[int, dict[str, Any]]) -> list[str]:
    """The candidates that a race trained: in a short run one alone, at several rates."""
    return list(dict.fromkeys(n for each in choices.values() for row in each["held_out_losses"] for n in row))


def _draw_choice(path: Path, config: Config, choices: Mapping[int, dict[str, Any]], chosen: Mapping[int, Plan]) -> None:
    criterion, of = config.fishpal.criterion, f"{config.task}, {config.model}"
    if criterion == "race":  # its scores are alike in all layers
        what = "the candidates" if len(_raced(choices)) > 1 else "learning rates"
        plots.race(path, choices, f"Race of {what}\n{of}")
        return
    title = f"Scores by {criterion!r}, and the module that each layer got\n{of}"
    kept = {seed: _kept(config, chosen[seed]) for seed in choices}
    plots.choice(path, {seed: _scores(found) for seed, found in choices.items()}, kept, title)


def count(table: Summary, params: dict[str, Any]) -> dict[str, Any]:
    """The parameter counts of `report.json`; percentages are of the plain model, base and head."""
    trains, added = sum(row.trainable for row in table.rows), sum(row.added for row in table.rows)
    head = sum(tree.count(params[name]) for name in Bert.HEAD)
    return {
        "base": table.base - head,
        "head": head,
        "trainable": trains,
        "trainable_percent": 100 * trains / table.base,
        "added_at_inference": added,
        "added_percent": 100 * added / table.base,
    }


def peak_memory() -> int:
    """Bytes: of the accelerator, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use", peak if platform.system() == "Darwin" else 1024 * peak)


def _scores(choice: dict[str, Any]) -> fishpal.Scores:
    return {int(layer): row for layer, row in choice["scores"].items()}


def _kept(config: Config, plan: Plan) -> dict[int, str]:
    """The name of the candidate that each layer of the plan has."""
    known = {(entry.method, json.dumps(entry.options)): name for name, entry in configs.candidates(config).items()}
    names = {layer: [known.get((e.method, json.dumps(dict(e.options)))) for e in row] for layer, row in plan.items()}
    return {layer: name for layer, (name, *_) in names.items() if name is not None}  # a plan may be edited by hand
