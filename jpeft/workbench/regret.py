"""What each criterion would have chosen, held against the plans that were trained.

    python -m jpeft.workbench.regret --config configs/compare_plans.py:sst2 --cells docs/results/plans

Reads the finished cells of a comparison whose variants are plans, measures every criterion on the same seeds (kept
beside the cells, so measured once), and prints, for each criterion: Kendall's tau between what it predicts and the
trained scores, the regret of its favourite among the plans, and its own pick. A plan's prediction is the sum over its
layers, but for `kernel`, which predicts whole plans. A name such as "adam_step@mrpc" takes what was measured on another
task, as a control: a criterion that looks at the task does better than that.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.plans import fishpal
from jpeft.plans import plan as plans
from jpeft.plans.fishpal import Candidates, Scores
from jpeft.plans.plan import Entry, Plan
from jpeft.report import tables
from jpeft.report.comparison import DRAWS, LEVEL, Outcome, interval, resampled
from jpeft.run import command, loading
from jpeft.run import config as configs
from jpeft.run.config import CRITERIA, Config
from jpeft.run.console import Console
from jpeft.run.criteria import CRITERIA as MEASURES
from jpeft.run.seed import begin
from jpeft.version import RESULTS
from jpeft.workbench import compare, findings
from jpeft.workbench.compare import Cell

__all__ = ["Verdict", "candidates_of", "config_of", "headroom", "measure", "predicted", "verdict"]


class Verdict(NamedTuple):
    """How a criterion did on a task.

    Attributes:
      tau: Kendall's, between its predictions and the trained scores; the mean over pairs of a seed that it was measured
        on and another one that was trained, or of equal seeds where there is only one.
      regret: the best plan's score less that of its favourite, on a seed that did not choose the best plan.
      regret_interval: of a paired bootstrap over evaluation rows and judging seeds; NaN where only scores are known.
      against_uniform: the favourite's score less that of the best uniform plan, likewise.
      uniform_interval: of that.
      pick: the best candidate of each layer, whether or not it was trained; of the first seed.
      passes: what it costs, in training passes.
    """

    tau: float
    regret: float
    regret_interval: tuple[float, float]
    against_uniform: float
    uniform_interval: tuple[float, float]
    pick: Plan
    passes: float


def candidates_of(pool: Mapping[str, Plan]) -> Candidates:
    """All modules that occur in the plans, by a name for each."""
    entries = [entry for plan in pool.values() for row in plan.values() for entry in row]
    return {_name(entry): entry for entry in entries}


def _name(entry: Entry) -> str:
    return f"{entry.method} {json.dumps(dict(entry.options), sort_keys=True)}"


def config_of(grid: Config, task: str, seed: int) -> Config:
    """The run by which all plans of a grid are measured: each kind at the rate at which its plans train."""
    config = compare.config_of(grid, Cell(task, next(iter(grid.variants)), None, seed))
    for fields in grid.variants.values():
        config.fishpal.learning_rates.update(fields["fishpal"].get("learning_rates", {}))
    return config


def measure(config: Config, seed: int, criterion: str, pool: Mapping[str, Plan], console: Console) -> dict[str, Any]:
    """What a criterion finds on a seed, JSON: the scores of modules, and what it says of each plan of the pool."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.fishpal.criterion, config.fishpal.plan, config.seeds = criterion, None, (seed,)
    data, base, _ = loading.load(config, Console(quiet=True))
    with tempfile.TemporaryDirectory() as scratch:  # the scores are all that is kept
        begun = begin(config, seed, data, base, Path(scratch), console)
        found = MEASURES[criterion](begun, candidates_of(pool))
    said = {"criterion": criterion, "seed": seed, "passes": found.passes, "scores": found.scores}
    if found.predict is None:
        return said
    named = {name: {layer: _name(entry) for layer, [entry] in plan.items()} for name, plan in pool.items()}
    return {**said, "plans": {name: found.predict(plan) for name, plan in named.items()}}


def predicted(found: Mapping[str, Any], name: str, plan: Plan) -> float:
    """What a criterion says of a plan: its own prediction, or else the sum of its modules' scores."""
    if "plans" in found:
        return found["plans"][name]
    return sum(found["scores"][str(layer)][_name(entry)] for layer, row in plan.items() for entry in row)


def uniform_of(pool: Mapping[str, Plan], names: Sequence[str]) -> list[str]:
    """Those of the named plans that have one and the same module in as many layers as any plan of the pool has."""
    most = max(map(len, pool.values()))
    return [
        name for name in names
        if len({_name(e) for row in pool[name].values() for e in row}) == 1 and len(pool[name]) == most
    ]  # fmt: skip


def headroom(trained: Mapping[int, Mapping[str, float]], uniform: Sequence[str]) -> float:
    """The best plan's score less the best uniform one's, both chosen on one seed and judged on the others."""
    gaps = []
    for chosen_on in trained:
        best = max(trained[chosen_on], key=lambda name: trained[chosen_on][name])
        plain = max(uniform, key=lambda name: trained[chosen_on][name])
        gaps += [trained[s][best] - trained[s][plain] for s in trained if s != chosen_on]
    return float(np.mean(gaps)) if gaps else float("nan")


def verdict(
    found: Mapping[int, Mapping[str, Any]],
    trained: Mapping[int, Mapping[str, float]],
    pool: Mapping[str, Plan],
    drawn: Mapping[int, Mapping[str, np.ndarray]] | None = None,
) -> Verdict:
    """Compares what a criterion found with what was trained.

    Args:
      found: by seed, from `measure`.
      trained: by seed and plan, the scores.
      pool: the plans.
      drawn: by seed and plan, scores [draws] on rows drawn anew, for intervals; None gives none.
    """
    from scipy.stats import kendalltau

    names = [name for name in pool if all(name in row for row in trained.values())]
    uniform = uniform_of(pool, names)
    taus: list[float] = []
    regrets: list[tuple[int, str, str]] = []  # a seed that judges, and two plans, of which the first should be better
    gaps: list[tuple[int, str, str]] = []
    for measured, own in found.items():
        said = [predicted(own, name, pool[name]) for name in names]
        favourite = names[int(np.argmax(said))]
        for judge in [s for s in trained if s != measured] or list(trained):
            got = [trained[judge][name] for name in names]
            taus.append(float(np.asarray(kendalltau(said, got))[0]))
            others = [s for s in trained if s != judge] or [judge]
            mean = {name: np.mean([trained[s][name] for s in others]) for name in names}
            regrets.append((judge, max(names, key=lambda n: mean[n]), favourite))
            gaps.append((judge, favourite, max(uniform, key=lambda n: mean[n])))

    def of(pairs: Sequence[tuple[int, str, str]]) -> tuple[float, tuple[float, float]]:
        mean = float(np.mean([trained[seed][one] - trained[seed][other] for seed, one, other in pairs]))
        if drawn is None:
            return mean, (float("nan"), float("nan"))
        # What one seed judges hangs together, so seeds are drawn anew, and not pairs of seeds.
        gaps: dict[int, list[np.ndarray]] = {}
        for seed, one, other in pairs:
            gaps.setdefault(seed, []).append(drawn[seed][one] - drawn[seed][other])
        return mean, interval(np.stack([np.mean(own, axis=0) for own in gaps.values()]))

    first = next(iter(found.values()))
    plain = [_name(pool[name][0][0]) for name in uniform]  # in the order of the pool, which decides ties
    table: Scores = {int(layer): {name: row[name] for name in plain} for layer, row in first["scores"].items()}
    pick = fishpal.choose(table, candidates_of(pool))
    return Verdict(float(np.mean(taus)), *of(regrets), *of(gaps), pick, first["passes"])


def _table(task: str, verdicts: Mapping[str, Verdict], ceiling: float, room: float, plans: int, seeds: int) -> str:
    lines = [
        f"## {task}: {plans} plans, {seeds} seeds", "",
        f"Headroom, best plan less best uniform plan, cross-fitted: {100 * room:+.2f} points. Kendall's tau of one "
        f"seed with another: {ceiling:.2f}.", "",
        f"| criterion | tau | regret ({LEVEL} % interval) | against the best uniform plan | training passes | its own "
        "pick |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for name, v in verdicts.items():
        points = _points(v.regret, v.regret_interval), _points(v.against_uniform, v.uniform_interval)
        cells = f"{v.tau:+.2f}", *points, f"{v.passes:,.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(tables.plan_lines(v.pick))} |")
    return "\n".join(lines) + "\n"


def _points(gap: float, ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{100 * gap:+.2f} ({100 * low:+.1f} to {100 * high:+.1f})"


def run(argv: list[str]) -> None:
    """Measures what is not measured yet, and prints the table of each task."""
    own = {"cells": "Folder of the finished cells; `cells` by default.", "criteria": "Comma-separated; all by default."}
    example = "configs/compare_plans.py:sst2"
    explained = "jpeft.workbench.compare:default", command.RUN
    given = command.parse(
        argv, __doc__ or "", own, example, lambda: compare.default(("fishpal",), ("sst2",)), explained=explained
    )
    grid, folder, console = given.config, Path(given.flags["cells"] or "cells"), Console()
    asked = given.flags["criteria"]
    chosen = asked.split(",") if asked else list(CRITERIA)
    for name in chosen:
        if name.partition("@")[0] not in CRITERIA:
            raise UserError(f"the criterion {name!r} is unknown: {nearest(name, CRITERIA)}")
    compare.check(grid)
    for name, fields in grid.variants.items():
        if not fields.get("fishpal", {}).get("plan"):
            raise UserError(f"config.variants[{name!r}] is no plan: expected fishpal.plan in all of them")
    outcomes = findings.outcomes(grid, folder)
    for task in grid.tasks:
        rows: list[Outcome] = [o for o in outcomes if o.task.name == task]
        if not rows:
            raise UserError(f"no finished cell of {task} in {folder}: run python -m jpeft.compare first")
        trained: dict[int, dict[str, float]] = {}
        drawn: dict[int, dict[str, np.ndarray]] = {}
        for o in rows:
            trained.setdefault(o.seed, {})[o.variant] = o.score()
            drawn.setdefault(o.seed, {})[o.variant] = resampled(o, DRAWS)
        pool = {name: plans.loads(grid.variants[name]["fishpal"]["plan"]) for name in grid.variants}
        verdicts = {}
        for criterion in chosen:
            name, _, other = criterion.partition("@")
            found = {}
            for seed in trained:
                path = folder / "scores" / f"{other or task}-{name}-{seed}.json"
                config = config_of(grid, other or task, seed)
                of = _identity(config, pool)
                if not path.is_file():
                    console.title(f"{name} on {other or task}, seed {seed}")
                    files.write_json(path, {**measure(config, seed, name, pool, console), "of": of})
                found[seed] = files.read_json(path)
                if found[seed].get("of") != of:
                    raise UserError(f"{path} was measured by another config or version, or of other plans: remove it")
            verdicts[criterion] = verdict(found, trained, pool, drawn)
        names = [name for name in pool if all(name in row for row in trained.values())]
        room = headroom(trained, uniform_of(pool, names))
        console.say("\n" + _table(task, verdicts, _ceiling(trained, names), room, len(names), len(trained)))


def _identity(config: Config, pool: Mapping[str, Plan]) -> dict[str, Any]:
    """What a measurement depends on besides what is in its file's name."""
    named = {name: plans.dumps(plan) for name, plan in pool.items()}
    rest = {name: x for name, x in configs.chosen(config).items() if name not in ("data.path", "fishpal.plan", "seeds")}
    return json.loads(json.dumps({**rest, "results": RESULTS, "plans": named}))


def _ceiling(trained: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> float:
    from scipy.stats import kendalltau

    pairs = [(a, b) for a in trained for b in trained if a < b]
    taus = [np.asarray(kendalltau(*([trained[s][n] for n in names] for s in pair)))[0] for pair in pairs]
    return float(np.mean(taus)) if taus else float("nan")


if __name__ == "__main__":
    sys.exit(command.call(run, None))
