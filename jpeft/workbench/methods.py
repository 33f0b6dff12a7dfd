"""Compares all methods on the five axes of the field: storage, memory, computation, accuracy, inference overhead.

    python -m jpeft.workbench.methods --workdir runs/methods

For each method: what trains and what stays at inference on the shapes of bert-base; the time of a training and of an
inference step over those of full fine-tuning, measured in turn, and the memory that XLA plans for the training step,
on the shapes of the model; and, with `--cells`, the dev scores that a grid of `jpeft.compare` found for the methods.
Writes methods.md, methods.json and methods.png. Run again, it resumes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files, site, transform, tree
from jpeft.core.errors import UserError, nearest
from jpeft.core.partition import partition
from jpeft.core.summary import summary
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig, pretrained
from jpeft.plans.plan import PLANS, build
from jpeft.report import plots
from jpeft.run import command
from jpeft.run import config as configs
from jpeft.run.console import Console
from jpeft.training import draws, optim
from jpeft.training import step as stepping
from jpeft.transforms.registry import METHODS, MODULES
from jpeft.workbench.cells import KIND
from jpeft.workbench.findings import RECIPE

BASE = BertConfig()  # the shapes of bert-base
BATCH, LENGTH, PAIRS = 16, 64, 5
NAMES = ["full", "head", *MODULES, "fishpal"]


def sizes(name: str, params: dict[str, Any], sites: site.Sites) -> dict[str, Any]:
    """Parameters that train without the head, and that stay at inference, in percent of the base; whether it merges."""
    method = _method(name, BASE.num_hidden_layers)
    leaves = transform.init(method, jax.random.key(0), sites, params)
    rows = summary(method, leaves, params).rows
    total = tree.count(params)
    trains = tree.count(params) if name == "full" else sum(row.trainable for row in rows)
    merges = all(member.merge is not None for member in transform.members(method))
    return {
        "trainable_percent": 100 * trains / total,
        "added_percent": 100 * sum(row.added for row in rows) / total,
        "merges": merges,
    }


def cost(name: str, model: Bert, params: dict[str, Any], full: "Timed | None") -> tuple[dict[str, Any], "Timed"]:
    """Step times over those of full fine-tuning, medians of pairs in turn, and the memory of a training step."""
    timed = Timed(name, model, params)
    against = full or timed
    ratios: dict[str, list[float]] = {"train": [], "infer": []}
    for kind, values in ratios.items():
        for _ in range(PAIRS):
            reference = against.seconds(kind)
            values.append(timed.seconds(kind) / reference)
    found = {f"{kind}_time_ratio": statistics.median(values) for kind, values in ratios.items()}
    return {**found, "train_memory_bytes": timed.memory}, timed


class Timed:
    """The compiled training and inference steps of a method, ready to be timed."""

    def __init__(self, name: str, model: Bert, params: dict[str, Any]):
        method = _method(name, model.config.num_hidden_layers)
        rng = np.random.default_rng(0)
        shape = (BATCH, LENGTH)
        ids = rng.integers(1, model.config.vocab_size, shape, np.int32)
        ones = np.ones(shape, np.int32)
        batch = Batch(ids, ones, 0 * ones, rng.integers(0, 2, BATCH, np.int32), np.ones(BATCH, np.float32))
        leaves = transform.init(method, jax.random.key(0), site.sites(model, ids), params)
        parts = partition(method, params, leaves, trains=params if name == "full" else model.HEAD)
        trainable, frozen = parts.trainable, parts.frozen
        optimizer = optim.adamw(optim.warmup_linear(1e-5, 100, 0.0), 0.01, parts)
        state = stepping.init_state(trainable, optimizer)
        key = draws.dropout_key(jax.random.key(0))  # as in a run
        train = jax.jit(stepping.train_step(model, method, optimizer)).lower(state, frozen, batch, key).compile()
        # As it would be served: merged and folded.
        merged = transform.merge(method, transform.fold(method, leaves), params)
        served = {"params": merged.params, "peft": merged.leaves}
        infer = jax.jit(stepping.eval_step(model, merged.transform)).lower(served, {}, batch).compile()
        stats = train.memory_analysis()
        assert stats is not None
        self.memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes  # outputs take over the state's buffers
        self._run: dict[str, Callable[[], Any]] = {
            "train": lambda: train(state, frozen, batch, key),
            "infer": lambda: infer(served, {}, batch),
        }

    def seconds(self, kind: str) -> float:
        """The time of one step."""
        start = time.perf_counter()
        jax.block_until_ready(self._run[kind]())
        return time.perf_counter() - start


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """What the finished cells of a grid say of each method: of the variants that are called as one.

    Args:
      folder: of the cells' files, all of one task.

    Returns:
      {method: row}, with the name of the "primary_metric", its "scores" by seed, the "learning_rate" (None where
      FishPAL found it), and "module_bytes", of a saved module with its head (None in cells of an earlier version).

    Raises:
      UserError: if a file is not one of a cell, if there is none, or if they are of several tasks, data, base models or
        recipes (but for the rates of methods), or of other options than the default ones, of which the sizes are.
    """
    rows = [files.read_record(path, KIND) for path in sorted(folder.glob("*.json"))]
    rows = [row for row in rows if row["variant"] in NAMES]
    if len(tasks := sorted({row["task"] for row in rows})) != 1:
        raise UserError(f"--cells {folder} must have cells of methods on one task, has {', '.join(tasks) or 'none'}")
    found: dict[str, dict[str, Any]] = {}
    recipes: dict[str, Any] = {}
    first = next((row for row in rows if row.get("inputs")), rows[0])  # which cells of an earlier version lack
    for row in rows:
        if other := _other(row, first):
            raise UserError(f"--cells {folder} has cells of more than one {other}: give it those of one grid")
        name, metric = row["variant"], row["primary_metric"]
        if row["config"]["method"] != name or any(field.startswith("peft.") for field in row["config"]):
            raise UserError(f"--cells {folder}: {name} there is not the method of that name with its default options")
        rate = None if "choice" in row else row["config"].get("train.learning_rate", METHODS[name].learning_rate)
        about = {"primary_metric": metric, "learning_rate": rate, "module_bytes": row.get("module_bytes"), "scores": {}}
        recipe = {field: x for field, x in row["config"].items() if field != "seeds"}
        if recipe != recipes.setdefault(name, recipe) or str(row["seed"]) in found.get(name, {"scores": {}})["scores"]:
            raise UserError(f"--cells {folder} has cells of {name} by several recipes: give it those of one")
        found.setdefault(name, about)["scores"][str(row["seed"])] = row["metrics"][metric]
    return found


def _other(row: Mapping[str, Any], first: Mapping[str, Any]) -> str | None:
    """In what a cell is of another grid than the first one, whatever their methods are; None if in nothing."""
    if name := next((name for name in RECIPE if row["config"].get(name) != first["config"].get(name)), None):
        return name
    own, others = row.get("inputs") or {}, first.get("inputs") or {}
    about = {"train": "set of training rows", "dev": "set of evaluation rows", "base": "base model"}
    both = {name: told for name, told in about.items() if name in own and name in others}
    return next((told for name, told in both.items() if own[name] != others[name]), None)


def _method(name: str, num_layers: int) -> transform.Chain:
    if name == "fishpal":  # the plan that the thesis prints, as far as the model has layers
        return build({layer: entries for layer, entries in PLANS["thesis_mrpc"].items() if layer < num_layers})
    return build([] if name not in MODULES else [{"method": name, "options": {}}])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table, one row a method; scores are means over seeds and their standard deviation, in percent."""
    metric = next((row["primary_metric"] for row in rows.values() if "scores" in row), "score")
    head = ["method", "trains %", "adds %", "merges", "train time", "inference time", "memory MB", "file kB"]
    head += ["learning rate", metric]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, row in rows.items():
        cells = [
            name,
            f"{row['trainable_percent']:.3f}",
            f"{row['added_percent']:.3f}",
            "yes" if row["merges"] else "no",
            f"{row['train_time_ratio']:.2f}",
            f"{row['infer_time_ratio']:.2f}",
            f"{row['train_memory_bytes'] / 1e6:.0f}",
            *_scored(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _scored(row: dict[str, Any]) -> list[str]:
    if "scores" not in row:
        return ["-", "-", "-"]
    rate, values = row["learning_rate"], [100 * value for value in row["scores"].values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    rate = "chosen" if rate is None else f"{rate:g}"
    size = "-" if row["module_bytes"] is None else f"{row['module_bytes'] / 1e3:.0f}"
    return [size, rate, f"{statistics.fmean(values):.1f}{spread}"]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command.Parser("python -m jpeft.workbench.methods", description="Compares all methods.")
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"), help="results; kept between starts")
    parser.add_argument("--model", default="minilm", help="whose shapes are timed")
    parser.add_argument(
        "--cells", type=Path, help="finished cells of a grid of all methods, such as docs/results/methods"
    )
    parser.add_argument("--methods", default=",".join(NAMES), help="comma-separated; all by default")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Measures every method that is not measured yet, and writes the table; exit code 2 after a user's error."""
    return command.call(_run, argv)


def _run(argv: list[str]) -> None:
    args = _parse(argv)
    names = args.methods.split(",")
    for name in names:
        if name not in NAMES:
            raise UserError(f"method {name!r} is unknown: {nearest(name, NAMES)}")
    if args.cells:  # before minutes of measuring
        scores(args.cells)
    if args.workdir.exists() and not args.workdir.is_dir():
        raise UserError(f"--workdir {args.workdir} is not a folder")
    _measure(names, args, Console())


def _measure(names: list[str], args: argparse.Namespace, console: Console) -> None:
    path = args.workdir / "methods.json"
    of = {"model": args.model, "batch": [BATCH, LENGTH], "device": jax.devices()[0].device_kind}
    kept = files.read_json(path) if path.is_file() else {"of": of, "rows": {}}
    if kept.get("of") != of:
        raise UserError(f"{path} has what was measured of {kept.get('of')}, not of {of}: choose another --workdir")
    rows: dict[str, dict[str, Any]] = kept["rows"]
    loaded = pretrained.load(args.model, num_labels=2, key=jax.random.key(0))
    model = Bert(loaded.config)
    # What was measured with other defaults of a method is measured again.
    now = {name: configs.results(configs.default("mrpc", name), loaded.config) for name in names}
    todo = [name for name in names if rows.get(name, {}).get("results") != now[name]]
    if todo:
        shape = jax.ShapeDtypeStruct((1, LENGTH), "int32")
        base = Bert(BASE)
        base_params = dict(base.init(jax.random.key(0), jnp.ones((1, 4), "int32"))["params"])
        base_sites = site.sites(base, shape)
        full = cost("full", model, loaded.params, None)[1]
        for name in todo:
            console.title(f"{name}: sizes and times")
            measured, _ = cost(name, model, loaded.params, full)
            rows[name] = {**sizes(name, base_params, base_sites), **measured, "results": now[name]}
            files.write_json(path, {"of": of, "rows": rows})
    scored = scores(args.cells) if args.cells else {}
    rows = {name: rows[name] | scored.get(name, {}) for name in NAMES if name in rows}
    files.write_text(args.workdir / "methods.md", table(rows))
    if any("scores" in row for row in rows.values()):
        plots.methods(args.workdir / "methods.png", rows)
    console.say("\n" + table(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
