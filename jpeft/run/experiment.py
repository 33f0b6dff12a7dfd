"""A whole run, top to bottom: data, model, choose, train, evaluate, export, report."""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jpeft.core import files, tree
from jpeft.core.errors import UserError
from jpeft.core.hook import apply
from jpeft.core.partition import partition
from jpeft.core.summary import summary
from jpeft.data.task import Data
from jpeft.models import pretrained
from jpeft.models.pretrained import Pretrained
from jpeft.plans import plan as plans
from jpeft.plans.plan import Plan
from jpeft.report import tables
from jpeft.run import checks, choose, finished, hosts, log
from jpeft.run import config as configs
from jpeft.run import workdir as workdirs
from jpeft.run.clock import Clock
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.finished import Result
from jpeft.run.loading import load
from jpeft.run.seed import Seed, begin
from jpeft.run.start import start
from jpeft.run.train import Ready, groups, most_together, train
from jpeft.store import model_folder
from jpeft.training import placement, step
from jpeft.training.compiled import Compiled
from jpeft.training.loop import Event, evaluate
from jpeft.transforms.parts.inputs import lengthens

__all__ = ["PREDICTIONS", "run", "use_compilation_cache"]

MODULES_FILES = (f"model/{model_folder.WEIGHTS}", f"model/{model_folder.DESCRIPTION}")
RESULT = "result.json"
# "logits" [n, num_labels] and "labels" of the dev examples, in their order; of tagging, the logits of all words.
PREDICTIONS = "predictions.safetensors"


def run(config: Config, workdir: Path, console: Console | None = None, command: str | None = None) -> dict[str, Any]:
    """Runs an experiment, or what is left of it, and returns its report.

    Args:
      config: see `jpeft.run.config.default`.
      workdir: made if need be; a workdir that holds an unfinished run of the same config is resumed.
      console: where to print; None means standard output.
      command: the command line that makes this run, for the report.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: for anything that the user can mend.
    """
    console = console or Console(quiet=not hosts.is_first())
    checks.check(config)
    with hosts.lost(), hosts.own_folder(workdir) as own, contextlib.ExitStack() as held:
        hosts.in_all(lambda: held.enter_context(workdirs.locked(own, console.warn)))
        return _run(config, own, console, command)


def _run(config: Config, workdir: Path, console: Console, command: str | None) -> dict[str, Any]:
    warned = len(console.warnings)  # a console may serve many runs
    hosts.in_all(lambda: workdirs.check_config(workdir, config))
    mesh = placement.all_devices()
    use_compilation_cache()
    console.title(f"{config.method} on {config.task} with {config.model}, in {workdir}")
    if len(config.seeds) > 1:
        console.say(f"  {len(config.seeds)} seeds: {', '.join(map(str, config.seeds))}")
    if mesh is not None:
        base = "the base model in parts on them" if config.train.shard_base else "the base model on each of them"
        console.say(f"  {mesh.size} devices: rows divided among them, {base}")
    clock = Clock()
    with clock.timing("load"):
        data, base, inputs = hosts.in_all(lambda: load(config, console))
        begun = workdirs.begin if hosts.is_first() else workdirs.begun
        hosts.in_turn(workdir, lambda: begun(workdir, config, inputs))
    paths = {seed: workdir / f"seed_{seed}" / RESULT for seed in config.seeds}
    finished_earlier = hosts.from_first([seed for seed, path in paths.items() if _intact(path, seed, config, console)])
    for seed in finished_earlier:
        console.say(f"  seed {seed}: finished earlier")
    todo = [seed for seed in config.seeds if seed not in finished_earlier]
    ready = (_in_turn(config, seed, data, base, workdir, console) for seed in todo)
    for group in groups(ready, most_together(config)):
        ends = train(group)
        hosts.in_all(lambda group=group, ends=ends: _finish(group, ends))

    def report() -> dict[str, Any] | None:
        if not hosts.is_first():
            return None
        results = {seed: finished.read(path) for seed, path in paths.items()}
        own = console.warnings[warned:]
        return finished.write(config, data, results, clock.seconds, workdir, console, command, own)

    return hosts.from_first(hosts.in_all(report))


def _finish(group: Sequence[Ready], ends: Sequence[Event]) -> None:
    for each, last in zip(group, ends, strict=hosts.is_first()):
        finished.save(each.seed.folder / RESULT, _export(each, last))


def _in_turn(config: Config, seed: int, data: Data, base: Pretrained, workdir: Path, console: Console) -> Ready:
    """What is chosen and measured is the same in all processes: the first one's."""
    return hosts.in_turn(workdir / f"seed_{seed}", lambda: _prepare(config, seed, data, base, workdir, console))


def _intact(path: Path, seed: int, config: Config, console: Console) -> bool:
    """Whether a seed is finished, and all that it should have left is there, as it was written, and its own."""
    if not path.is_file() or not hosts.is_first():
        return False
    try:
        result = finished.read(path)
        if result.owner != workdirs.owner(path.parents[1], config, seed):
            raise UserError(f"{path} is of another run or seed")
        model_folder.verify(path.parent / "model")
        for name, written in result.files.items():
            if not (path.parent / name).is_file() or files.file_hash(path.parent / name) != written:
                raise UserError(f"{path.parent / name} is missing, or not the one that was written")
    except UserError as error:
        console.warn(f"seed {seed} is finished, but {error}; rebuilding it, from the last checkpoint if there is one")
        return False
    if configs.first_method(config).chooses:
        choose.kept(path.parent, config)  # or the report would be of another plan
    if log.mend(path.parents[1], seed, result.history, result.history[-1]["step"], config.seeds):
        console.warn(f"metrics.jsonl lacked epochs of seed {seed}, which were added")
    return True


def use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of the user's, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jpeft" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _prepare(config: Config, number: int, data: Data, base: Pretrained, workdir: Path, console: Console) -> Ready:
    """All that comes before training: chooses the modules, and makes the leaves."""
    console.title(f"seed {number}")
    warned = len(console.warnings)
    seed = begin(config, number, data, base, workdir, console)
    method_of = configs.first_method(config)
    with seed.clock.timing("fisher"):
        if method_of.chooses:
            plan = choose.plan(seed)
            modules = plans.spec(plan)
            _say_plan(plan, config, console)
        else:
            modules = configs.modules(config)
        method = plans.build(modules, configs.rates(config))
        params, leaves = start(seed, modules, choose.leaves(seed, method))
    rate = choose.rate(seed) if method_of.chooses else 1.0
    _check_room(seed, method, params, leaves)
    parts = partition(method, params, leaves, trains=params if method_of.trains_base else seed.head)
    table = summary(method, leaves, params, parts.trainable["params"])
    console.say(str(table))
    return Ready(seed, modules, method, parts, table, finished.count(table, params), console.warnings[warned:], rate)


def _check_room(seed: Seed, method: Any, params: Any, leaves: Any) -> None:
    """Checks that the longest text and the virtual tokens fit together, though no row to train on may be that long."""
    if not lengthens(leaves):
        return
    ids = jax.ShapeDtypeStruct((1, seed.config.train.max_length), "int32")
    run = functools.partial(apply, seed.model, method)
    try:
        jax.eval_shape(lambda ids: run({"params": params, "peft": leaves}, ids, ids, mask=ids), ids)
    except UserError as error:
        raise UserError(f"config.train.max_length {seed.config.train.max_length} is too long: {error}") from None


def _export(ready: Ready, last: Event) -> Result:
    """All that comes after training: writes the modules and the predictions."""
    seed, parts, config, data = ready.seed, ready.parts, ready.seed.config, ready.seed.data
    files.write_leaves(seed.folder / PREDICTIONS, {"logits": last.logits, "labels": data.dev.labels})
    module_bytes = model_folder.save(
        seed.folder / "model",
        tree.union({"peft": parts.frozen["peft"]}, last.state.trainable),
        ready.modules,
        base=seed.base.source,
        fingerprint=pretrained.fingerprint(parts.frozen["params"]),
        identity=pretrained.identity(seed.base),
        quantise=config.quantise,
        quantise_except=config.quantise_except,
        task=data.task.name,
        labels=data.task.labels,
        kind=data.task.kind,
        max_length=config.train.max_length,
        num_texts=len(data.task.text),
        own_encode=data.task.own_encode,
    )
    return Result(
        list(last.history),
        str(ready.table),
        {**ready.counts, "module_bytes": module_bytes},
        seed.clock.seconds,
        data.train.size * config.train.num_epochs,
        data.dev.size * config.train.num_epochs,
        finished.peak_memory(),
        ready.warnings,
        workdirs.owner(seed.workdir, config, seed.seed),
        {name: files.file_hash(seed.folder / name) for name in (*MODULES_FILES, PREDICTIONS)},
        _other_scores(ready, last.state.trainable),
    )


def _other_scores(ready: Ready, trainable: Any) -> dict[str, dict[str, float]]:
    """What the exported modules score on the splits that nothing was chosen by, a test set with labels for instance."""
    seed, data, scores = ready.seed, ready.seed.data, {}
    run = Compiled(step.eval_step(seed.model, ready.method), 2)
    for name, examples in data.others.items():
        longest = int(examples.lengths.max())
        buckets = [*data.eval_buckets, *([longest] if longest > data.eval_buckets[-1] else [])]
        with seed.console.waiting(f"evaluating on {name}"):
            logits = evaluate(run, trainable, ready.parts.frozen, examples, buckets)
        scores[name] = data.task.scores(logits, examples.labels)
    return scores


def _say_plan(plan: Plan, config: Config, console: Console) -> None:
    console.say("  plan, layer by layer: " + "; ".join(tables.plan_lines(plan)))
    methods = {entry.method for entries in plan.values() for entry in entries}
    by_layer = config.fishpal.plan is not None or config.fishpal.criterion != "race"
    if len(methods) == 1 and by_layer:
        console.warn(f"the plan is {methods.pop()} throughout: the choice by layer changed nothing")
