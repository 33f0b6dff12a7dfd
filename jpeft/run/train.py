"""Trains seeds, one or several together: drives the loop, and shows, logs, saves and times what it yields."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.core.partition import Partition
from jpeft.core.summary import Summary
from jpeft.core.transform import Chain, Transform, members
from jpeft.core.tree import union
from jpeft.data.padding import padded_lengths
from jpeft.data.task import Data
from jpeft.models.bert import narrowed
from jpeft.plans.plan import Spec
from jpeft.run import config as configs
from jpeft.run import hosts
from jpeft.run.config import Config
from jpeft.run.log import Log
from jpeft.run.seed import Seed
from jpeft.run.stopping import Stopped, deferred
from jpeft.run.workdir import owner
from jpeft.training import below, checkpoint, optim, placement, step
from jpeft.training.compiled import Compiled, Steps, planned_memory, prepare
from jpeft.training.loop import Event, Row, Schedule, evaluate, fit_together
from jpeft.training.step import State

__all__ = ["Ready", "groups", "most_together", "train"]

CHECKPOINT_SECONDS = 300.0  # between the ends of epochs, which are always saved
EVENT_SECONDS = 0.2  # between looks at the losses, which move the bar
EVENT_STEPS = 16  # likewise of several processes, which must look at the same steps
BEST = "best.safetensors"  # what trains, as it was after the best epoch
FILL = 0.9  # of an accelerator's memory


class Ready(NamedTuple):
    """A seed that is ready to train.

    Attributes:
      seed: what it starts from.
      modules: its modules, as data.
      method: the same as a transform.
      parts: its variables, those that train and those that do not.
      table: of what trains and what stays.
      counts: of parameters, as in the report.
      warnings: of its preparation; those of its training are added.
      rate: the multiple of the configured learning rate that it trains at.
    """

    seed: Seed
    modules: Spec
    method: Transform | Chain
    parts: Partition
    table: Summary
    counts: dict[str, Any]
    warnings: list[str]
    rate: float = 1.0


class _Start(NamedTuple):
    """A seed and where its training begins: at the first step, or at its last checkpoint."""

    ready: Ready
    state: State
    history: Sequence[Row]
    loss_sum: float


def most_together(config: Config) -> int:
    """How many seeds train together at most.

    `config.train.together`, or all of them on an accelerator, which one run leaves idle, and one on a CPU, which it
    does not.
    """
    given = config.train.together
    return given or (1 if jax.default_backend() == "cpu" else len(config.seeds))


def groups(ready: Iterable[Ready], most: int) -> Iterator[list[Ready]]:
    """Groups of at most `most` neighbours that can train together: of the same modules, and arrays of the same shapes.

    Plans and masks may differ from seed to seed, as FishPAL's and FISH's do; those train one after the other.
    """
    group: list[Ready] = []
    for each in ready:
        if group and _shape(each) != _shape(group[0]):
            yield group
            group = []
        group.append(each)
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


def _shape(ready: Ready) -> Any:
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (ready.parts.trainable, ready.parts.frozen))
    return ready.modules, ready.rate, shapes


def train(group: Sequence[Ready]) -> list[Event]:
    """Trains, or resumes from the last checkpoints, and returns the last event of each seed, with dev logits.

    Of several processes, the first alone writes, and others return nothing.

    Every event goes to the bar; epochs, and some steps, to `metrics.jsonl`; the states to checkpoints at the end of
    every epoch, in between where epochs are long, and when the process is asked to stop. Each seed has its own.

    Args:
      group: seeds that can train together, from `groups`.

    Raises:
      Stopped: after SIGTERM, when the states are saved.
    """
    console = group[0].seed.console
    warned = len(console.warnings)
    starts = [_start(ready) for ready in group]
    # A stop between the checkpoints of two seeds leaves one of them behind.
    reached = [int(start.state.step) for start in starts]  # read now: training gives up the states
    last = {}
    for number in sorted(set(reached)):
        level = [start for start, at in zip(starts, reached, strict=True) if at == number]
        last |= {start.ready.seed.seed: event for start, event in zip(level, _train(level), strict=True)}
    if not hosts.is_first():
        return []
    for ready in group:
        ready.warnings.extend(console.warnings[warned:])
    return [_exported(ready, last[ready.seed.seed]) for ready in group]


def _optimizer(ready: Ready) -> Any:
    config, total = ready.seed.config, _schedule(ready.seed).num_steps(ready.seed.data)
    rate = optim.warmup_linear(ready.rate * configs.learning_rate(config), total, config.train.warmup_ratio)
    return optim.adamw(rate, config.train.weight_decay, ready.parts)


def _schedule(seed: Seed) -> Schedule:
    return Schedule(seed.config.train.num_epochs, seed.seed, seed.dropout_key)


def _layouts(seed: Seed) -> list[list[list[int]]]:
    """As a checkpoint has them: accelerators pad otherwise than CPUs, and then other rows meet in a batch."""
    return [[list(part) for part in layout] for layout in seed.data.layouts]


def _owner(seed: Seed) -> str:
    return owner(seed.workdir, seed.config, seed.seed)


def _start(ready: Ready) -> _Start:
    seed = ready.seed
    state = step.init_state(ready.parts.trainable, _optimizer(ready))
    restored = hosts.in_all(lambda: _restored(seed, state) if hosts.is_first() else None)
    progress = hosts.from_first(None if restored is None else restored.progress)
    if progress is None:
        return _Start(ready, state, (), 0.0)
    state = hosts.shared(state if restored is None else restored.state)
    progress = checkpoint.Progress(*progress)
    if progress.layouts and progress.layouts != _layouts(seed):
        raise UserError(
            f"the checkpoint in {seed.folder} is of a machine on which batches are padded to other lengths: resume it "
            "there, or choose another --workdir"
        )
    seed.clock.seconds.update(progress.seconds)
    seed.console.say(f"resuming at step {int(state.step):,} of {_schedule(seed).num_steps(seed.data):,}")
    return _Start(ready, state, progress.history, progress.loss_sum)


def _restored(seed: Seed, like: State) -> checkpoint.Restored | None:
    return checkpoint.restore(seed.folder / "checkpoints", like, seed.console.warn, _owner(seed))


def _train(starts: Sequence[_Start]) -> list[Event]:
    """The last events of seeds that start at the same step."""
    ready = starts[0].ready
    seed, seeds = ready.seed, [start.ready.seed for start in starts]
    config, console, data, several = seed.config, seed.console, seed.data, len(starts) > 1
    schedules = [_schedule(each) for each in seeds]
    total = schedules[0].num_steps(data)
    per_epoch = total // schedules[0].num_epochs
    state, frozen, key = starts[0].state, _stored(ready), seed.dropout_key
    training = step.train_step(seed.model, ready.method, _optimizer(ready), data.task.loss)
    evaluation = step.eval_step(seed.model, ready.method)
    if several:
        training, evaluation = step.together(training, 0), step.together(evaluation, None)
        state, key = step.stack([start.state for start in starts]), jnp.stack([each.key for each in schedules])
        frozen = {**frozen, "peft": step.stack([start.ready.parts.frozen["peft"] for start in starts])}
    first, mesh = int(starts[0].state.step), placement.all_devices()
    if mesh is not None:
        state, key = placement.put((state, key), placement.whole(mesh))
        frozen = placement.frozen(mesh, frozen, config.train.shard_base)
    steps = Steps.compiled(training, evaluation, mesh)
    for each in seeds:
        each.clock.start(lambda: sum(getattr(fn, "seconds", 0.0) for fn in steps), shared_by=len(seeds))
    if first < total:
        data = hosts.in_all(lambda: _cached(ready))
        with console.waiting("compiling"):
            if several and not _fits(seeds, planned_memory(steps, state, frozen, data, key)):
                half = len(starts) // 2
                return [*_train(starts[:half]), *_train(starts[half:])]
            hosts.in_all(lambda: prepare(steps, state, frozen, data, key))
    logs, saved = [Log(start.ready.seed, first, start.history) for start in starts], time.monotonic()
    histories, sums = [tuple(start.history) for start in starts], [start.loss_sum for start in starts]
    events = tuple(
        Event(state, i if several else None, config.train.num_epochs, first, (), (), sums[i], histories[i])
        for i in range(len(starts))
    )
    names = [f"seed {each.seed}" for each in seeds] if several else []
    every_steps = EVENT_STEPS if hosts.several() else 0
    shown = console.training(total, first, names)
    with shown as bar, deferred() as stopping, checkpoint.in_background() as background:
        for events in fit_together(steps, state, frozen, data, schedules, histories, sums, EVENT_SECONDS, every_steps):
            ends_epoch = events[0].row is not None
            for each, log, event in zip(seeds, logs, events, strict=True):
                each.clock.lap("evaluate" if ends_epoch else "train")
                log.write(event)
                if ends_epoch and config.train.export == "best" and _is_best(event.history, data.task.primary):
                    about = {"epoch": str(event.history[-1]["epoch"])}
                    files.write_leaves(each.folder / BEST, jax.device_get(event.state.trainable), about)
            bar.show(events, data.task.primary, config.train.batch_size)
            # Not after the last step of an epoch: its checkpoint is the one that also holds the scores.
            between = not ends_epoch and events[0].step % per_epoch != 0
            stop, due = hosts.any_says(stopping(), time.monotonic() - saved > CHECKPOINT_SECONDS)
            if ends_epoch or (between and (stop or due)):
                _save(seeds, events, background)
                saved = time.monotonic()
                for each in seeds:
                    each.clock.start()
                if stop:  # after the last step, too: the next start saves the modules
                    raise Stopped(f"stopped and saved at step {events[0].step:,} of {total:,}")
    return [event._replace(states=jax.device_get(event.state), run=None) for event in events]


def _cached(ready: Ready) -> Data:
    """The data, if the config says so with what enters the lowest layer that trains; it is the same for all seeds."""
    seed, model = ready.seed, ready.seed.model
    if not seed.config.train.cache_frozen_layers:
        return seed.data
    layer, data = below.lowest(ready.parts, model.config.num_hidden_layers), seed.data
    if layer == 0:
        seed.console.warn("config.train.cache_frozen_layers: the lowest layer trains, so there is nothing to cache")
        return data
    size = below.planned_bytes(model.config, data.train, layer)
    seed.console.say(
        f"  what enters layer {layer} is computed once, without dropout below, and kept: {size / 1e6:,.0f} MB"
    )
    params, lengths = union(ready.parts.frozen["params"], ready.parts.trainable["params"]), padded_lengths(data.layouts)
    with seed.console.waiting("computing the layers that do not train"):
        return data._replace(train=below.with_hidden(model, params, data.train, layer, lengths))


def _save(seeds: Sequence[Seed], events: Sequence[Event], background: Callable[[Callable[[], None]], None]) -> None:
    """Saves states, in the background if there is one process; several of them wait for the one that writes."""
    parts = [
        (
            seed.folder / "checkpoints",
            checkpoint.snapshot(event.state),
            checkpoint.Progress(
                list(event.history), event.loss_sum, {**seed.clock.seconds}, _owner(seed), _layouts(seed)
            ),
        )
        for seed, event in zip(seeds, events, strict=True)
        if hosts.is_first()
    ]

    def write() -> None:
        for part in parts:
            checkpoint.save(*part)

    if hosts.several():
        hosts.in_all(write)
    else:
        background(write)


def _stored(ready: Ready) -> dict[str, Any]:
    """The frozen variables, the base weights once and for all as the encoder computes with them."""
    frozen, low = ready.parts.frozen, configs.dtype(ready.seed.config)
    if any(member.needs_float32 for member in members(ready.method)):
        return frozen
    return {**frozen, "params": narrowed(frozen["params"], low)}


def _fits(seeds: Sequence[Seed], planned: int) -> bool:
    """Whether the accelerator has the memory for these seeds together; says so. A CPU is not asked."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, names = stats.get("bytes_limit"), ", ".join(str(seed.seed) for seed in seeds)
    fits = not any(hosts.any_says(limit is not None and planned > FILL * limit))
    of = f" of {limit / 1e9:.1f}" if limit else ""
    how = "train together" if fits else "do not fit into memory together"
    seeds[0].console.say(f"  seeds {names} {how}: {planned / 1e9:.1f}{of} GB")
    return fits


def _exported(ready: Ready, event: Event) -> Event:
    """The event whose state is to be exported, with its logits."""
    seed = ready.seed
    if seed.config.train.export == "best" and not _is_best(event.history, seed.data.task.primary):
        path, best = seed.folder / BEST, max(event.history, key=lambda row: row[seed.data.task.primary])["epoch"]
        # It is written before the checkpoint, so a run that was killed between may not have that epoch any more.
        if (was := files.read_tensors(path)[1].get("epoch")) != str(best):
            raise UserError(
                f"{path} is of epoch {was}, but the best one is {best}: set train.export=last, or start again"
            )
        trainable = files.read_leaves(path)
        event = event._replace(states=event.state._replace(trainable=trainable), logits=None)
    if event.logits is None:  # of the best epoch; or stopped between the last checkpoint and the end of the run
        run = Compiled(step.eval_step(seed.model, ready.method), 2)
        frozen, data = ready.parts.frozen, seed.data
        logits = evaluate(run, event.state.trainable, frozen, data.dev, data.eval_buckets)
        event = event._replace(logits=logits)
    return event


def _is_best(history: Sequence[dict[str, Any]], primary: str) -> bool:
    """Whether the last epoch is the best so far; of equal ones, the first is."""
    return all(row[primary] < history[-1][primary] for row in history[:-1])
