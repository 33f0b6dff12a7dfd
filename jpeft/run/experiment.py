"""A whole run, top to bottom: data, model, choose, train, evaluate, export, report."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from jpeft.core import files, site, tree
from jpeft.core.errors import UserError
from jpeft.core.partition import partition
from jpeft.core.summary import summary
from jpeft.data import batching, tasks
from jpeft.models import Bert, pretrained
from jpeft.plans import plan as plans
from jpeft.plans.plan import Plan
from jpeft.report import tables
from jpeft.run import choose as choice
from jpeft.run import config as configs
from jpeft.run import finished
from jpeft.run.choose import Case
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.finished import Result
from jpeft.store import modules as saved
from jpeft.training import checkpoint, optim
from jpeft.training import step as stepping
from jpeft.training.loop import Schedule, compile_steps, fit
from jpeft.transforms.registry import METHODS

__all__ = ["Data", "run"]


class Data(NamedTuple):
    """A tokenised task: examples to train on, examples to evaluate on, and the lengths they are padded to."""

    task: tasks.Task
    train: batching.Examples
    dev: batching.Examples
    buckets: tuple[int, ...]


def run(config: Config, workdir: Path, console: Console | None = None) -> dict[str, Any]:
    """Runs an experiment, or what is left of it, and returns its report.

    Args:
      config: see `jpeft.config.default`.
      workdir: made if need be; a workdir that holds an unfinished run of the same config is resumed.
      console: where to print; None means standard output.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: for anything that the user can mend.
    """
    console = console or Console()
    configs.check(config)
    _check_workdir(workdir, config)
    _use_compilation_cache()
    console.title(f"{config.method} on {config.task} with {config.model}, in {workdir}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        task = tasks.task(config.task)
        base = _load_model(config, task, config.seeds[0])
        data = _load_data(config, task, base, console)
    # Only now: a run that failed for a path or a name leaves the workdir to the one that is corrected.
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    lengths = ", ".join(map(str, data.buckets))
    console.say(
        f"  {data.train.size:,} examples to train on, {data.dev.size:,} of {task.eval_split} to evaluate on, "
        f"padded to {lengths} tokens; loaded in {seconds['load']:.1f} s"
    )
    if base.fresh:
        console.say(f"  not in the checkpoint, so initialised and trained: {', '.join(base.fresh)}")
    del base  # each seed loads its own, with another head
    results = {}
    for seed in config.seeds:
        path = workdir / f"seed_{seed}" / "result.json"
        if path.is_file():
            console.say(f"  seed {seed}: finished earlier")
        else:
            result = _run_seed(config, seed, data, workdir, console)
            files.write_json(path, result._asdict())
        results[seed] = Result(**files.read_json(path))
    return finished.write(config, task, results, seconds, workdir, console)


def _check_workdir(workdir: Path, config: Config) -> None:
    """Finds that a workdir is new or this config's."""
    path = workdir / "config.json"
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file, not a folder")
    if not path.is_file():
        return
    there, here = (flatten_dict(x, sep=".") for x in (files.read_json(path), json.loads(config.to_json())))
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        told = "; ".join(f"config.{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differ)
        raise UserError(f"workdir {workdir} belongs to another config ({told}): take another --workdir")


def _use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of the user's, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jpeft" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _load_model(config: Config, task: tasks.Task, seed: int) -> pretrained.Pretrained:
    """The pretrained encoder; the seed decides the head that it lacks."""
    base = pretrained.load(config.model, num_labels=task.num_labels, key=jax.random.key(seed), dtype=config.train.dtype)
    if config.train.max_length > base.config.max_length:
        longest = base.config.max_length
        raise UserError(f"config.train.max_length {config.train.max_length}: {config.model} takes at most {longest}")
    if config.fishpal.plan is not None:
        plans.check(plans.read(config.fishpal.plan), base.config.num_hidden_layers)
    return base


def _load_data(config: Config, task: tasks.Task, base: pretrained.Pretrained, console: Console) -> Data:
    from transformers import AutoTokenizer

    if not task.trainable:
        raise UserError(f"config.task {task.name!r} is a test set without training data: train config.task 'mnli'")
    splits = tasks.load(task.name, config.data.path)
    for name, count in splits.empty_texts.items():
        console.warn(f"{task.name} {name}: {count} rows have an empty text")
    if splits.absent:
        console.say(f"  {splits.source} has no {', '.join(splits.absent)} split; none is needed")
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    train, dev = (
        batching.tokenize(splits.splits[name], task, tokenizer, config.train.max_length)
        for name in ("train", task.eval_split)
    )
    if config.train.max_train_examples is not None:
        train, _ = batching.sample(train, min(config.train.max_train_examples, train.size), seed=0)
    lengths = [length for examples in (train, dev) for length in examples.lengths]
    buckets = tuple(min(bucket, base.config.max_length) for bucket in batching.length_buckets(lengths))
    return Data(task, train, dev, buckets)


def _run_seed(config: Config, seed: int, data: Data, workdir: Path, console: Console) -> Result:
    """Chooses, trains, evaluates and exports for one seed."""
    console.title(f"seed {seed}")
    folder = workdir / f"seed_{seed}"
    seconds = {"fisher": 0.0, "compile": 0.0, "train": 0.0, "evaluate": 0.0}
    leaves_key, dropout_key = jax.random.split(jax.random.key(seed))
    base = _load_model(config, data.task, seed)
    model, params = Bert(base.config), base.params
    sites = site.sites(model, jax.ShapeDtypeStruct((1, data.buckets[0]), "int32"))
    case = Case(config, seed, base, model, sites, data.train, data.buckets, folder, leaves_key, console)

    with _timed(seconds, "fisher"):
        if config.method in METHODS and METHODS[config.method].measured:
            plan = choice.plan(case)
            modules = plans.spec(plan)
            _say_plan(plan, console)
        else:
            modules = configs.modules(config)
        method = plans.build(modules)
        leaves = choice.leaves(case, method)
    whole = METHODS[config.method].trains_base if config.method in METHODS else False
    head = [name for name in params if name in (*model.HEAD, *base.fresh)]
    parts = partition(method, params, leaves, trains=params if whole else head)
    made = summary(method, leaves, params, parts.trainable["params"])
    console.say(str(made))
    parameters = finished.count(made, params)

    schedule = Schedule(config.train.num_epochs, config.train.batch_size, seed, data.buckets)
    num_steps = schedule.num_epochs * batching.num_batches(data.train.size, schedule.batch_size)
    rate = optim.warmup_linear(configs.learning_rate(config), num_steps, config.train.warmup_ratio)
    optimizer = optim.adamw(rate, config.train.weight_decay, parts)
    steps = compile_steps(stepping.train_step(model, method, optimizer), stepping.eval_step(model, method), seconds)
    state = stepping.init_state(parts.trainable, optimizer)
    restored = checkpoint.restore(folder / "checkpoints" / "latest", state)
    reached = 0 if restored is None else int(restored.state.step)
    log = workdir / "metrics.jsonl"
    files.keep_lines(log, lambda row: row["seed"] != seed or row["step"] <= reached)
    fitted = fit(
        steps, state, parts.frozen, data.train, data.dev, data.task, schedule, dropout_key, seconds, restored,
        folder / "checkpoints", lambda row: files.append_json(log, {"seed": seed, **row}), console,
    )  # fmt: skip
    parameters["module_bytes"] = saved.save(
        folder / "model",
        tree.union({"peft": parts.frozen["peft"]}, fitted.state.trainable),
        modules,
        base=base.source,
        fingerprint=pretrained.fingerprint(parts.frozen["params"]),
        task=config.task,
        labels=data.task.labels,
        max_length=config.train.max_length,
    )
    seen, evaluated = (examples.size * schedule.num_epochs for examples in (data.train, data.dev))
    return Result(fitted.history, str(made), parameters, fitted.seconds, seen, evaluated, finished.peak_memory())


def _say_plan(plan: Plan, console: Console) -> None:
    console.say("  plan, layer by layer: " + "; ".join(tables.plan_lines(plan)))
    methods = {entry.method for entries in plan.values() for entry in entries}
    if len(methods) == 1:
        console.warn(f"the plan is {methods.pop()} throughout: the choice by layer changed nothing")
