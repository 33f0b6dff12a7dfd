"""One seed of a run: what it starts from, and how it is trained."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array

from jpeft.core import files, site
from jpeft.core.errors import UserError
from jpeft.core.partition import Partition
from jpeft.core.site import Sites
from jpeft.core.transform import Chain, Transform
from jpeft.data.task import Data
from jpeft.models import Bert, pretrained
from jpeft.models.pretrained import Pretrained
from jpeft.plans import plan as plans
from jpeft.run import config as configs
from jpeft.run.clock import Clock
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.stopping import Stopped, deferred
from jpeft.training import checkpoint, optim, step
from jpeft.training.loop import Event, Schedule, Steps, evaluate, fit, prepare

__all__ = ["Seed", "begin", "load_model", "mend_log", "train"]

CHECKPOINT_SECONDS = 300.0  # between the ends of epochs, which are always saved
LOG = "metrics.jsonl"
BEST = "best.safetensors"  # what trains, as it was after the best epoch
EVENT_SECONDS = 0.2  # between looks at the losses, which move the bar
LOG_EVERY = 50  # steps


class Seed(NamedTuple):
    """One seed of a run.

    Attributes:
      config: of the run.
      seed: of the head, the leaves, the examples that are looked at, the order of the rows and dropout.
      data: the tokenised task.
      base: the pretrained parameters with the seed's head.
      model: the encoder.
      sites: its sites.
      key: for the leaves.
      dropout_key: for training.
      workdir: of the run.
      console: shows what is going on.
      clock: times it.
    """

    config: Config
    seed: int
    data: Data
    base: Pretrained
    model: Bert
    sites: Sites
    key: Array
    dropout_key: Array
    workdir: Path
    console: Console
    clock: Clock

    @property
    def head(self) -> tuple[str, ...]:
        """The parts of the base that train whatever the method is: the head, and what the checkpoint lacked."""
        return tuple(name for name in self.base.params if name in (*self.model.HEAD, *self.base.fresh))

    @property
    def folder(self) -> Path:
        """Where everything that belongs to this seed is kept."""
        return self.workdir / f"seed_{self.seed}"


def begin(config: Config, seed: int, data: Data, workdir: Path, console: Console) -> Seed:
    """Loads the model with the head of this seed."""
    base = load_model(config, data.task.num_labels, seed)
    model = Bert(base.config)
    sites = site.sites(model, jax.ShapeDtypeStruct((1, data.buckets[0]), "int32"))
    key, dropout_key = jax.random.split(jax.random.key(seed))
    clock = Clock(dict.fromkeys(("fisher", "compile", "train", "evaluate"), 0.0))
    return Seed(config, seed, data, base, model, sites, key, dropout_key, workdir, console, clock)


def load_model(config: Config, num_labels: int, seed: int) -> Pretrained:
    """The pretrained encoder; the seed decides the head that it lacks.

    Raises:
      UserError: if it cannot be loaded, or does not fit the config.
    """
    base = pretrained.load(
        config.model,
        num_labels=num_labels,
        key=jax.random.key(seed),
        dtype=config.train.dtype,
        remat=config.train.remat,
    )
    if config.train.max_length > base.config.max_length:
        longest = base.config.max_length
        raise UserError(f"config.train.max_length {config.train.max_length}: {config.model} takes at most {longest}")
    if config.fishpal.plan is not None:
        plans.check(plans.read(config.fishpal.plan), base.config.num_hidden_layers)
    return base


def train(seed: Seed, method: Transform | Chain, parts: Partition) -> Event:
    """Trains, or resumes from the last checkpoint, and returns the last event, with the logits of the dev examples.

    Every event goes to the bar; epochs, and some steps, to `metrics.jsonl`; the state to a checkpoint at the end of
    every epoch, in between where epochs are long, and when the process is asked to stop.

    Raises:
      Stopped: after SIGTERM, when the state is saved.
    """
    config, clock = seed.config, seed.clock
    schedule = Schedule(config.train.num_epochs, config.train.batch_size, seed.seed, seed.dropout_key)
    total = schedule.num_steps(seed.data)
    per_epoch = total // schedule.num_epochs
    rate = optim.warmup_linear(configs.learning_rate(config), total, config.train.warmup_ratio)
    optimizer = optim.adamw(rate, config.train.weight_decay, parts)
    training = step.train_step(seed.model, method, optimizer, seed.data.task.loss)
    steps = Steps.compiled(training, step.eval_step(seed.model, method))
    state, history, loss_sum = step.init_state(parts.trainable, optimizer), (), 0.0
    restored = checkpoint.restore(seed.folder / "checkpoints", state, seed.console.warn)
    if restored is not None:
        state, (history, loss_sum, spent) = restored
        clock.seconds.update(spent)
        seed.console.say(f"resuming at step {int(state.step):,} of {total:,}")
    log, saved = Log(seed, int(state.step), history), time.monotonic()
    primary = seed.data.task.primary
    clock.start(lambda: sum(getattr(fn, "seconds", 0.0) for fn in steps))
    event = Event(state, config.train.num_epochs, int(state.step), (), (), loss_sum, tuple(history))
    if int(state.step) < total:
        with seed.console.waiting("compiling"):
            prepare(steps, state, parts.frozen, seed.data, schedule)
    with seed.console.training(total, int(state.step)) as bar, deferred() as stopping:
        for event in fit(steps, state, parts.frozen, seed.data, schedule, history, loss_sum, EVENT_SECONDS):
            clock.lap("train" if event.row is None else "evaluate")
            log.write(event)
            bar.show(event, primary, config.train.batch_size)
            if event.row is not None and config.train.export == "best" and _is_best(event.history, primary):
                files.write_leaves(seed.folder / BEST, jax.device_get(event.state.trainable))
            # Not after the last step of an epoch: its checkpoint is the one that also holds the scores.
            between = event.row is None and event.step % per_epoch != 0
            if event.row is not None or (between and (stopping() or time.monotonic() - saved > CHECKPOINT_SECONDS)):
                progress = checkpoint.Progress(list(event.history), event.loss_sum, clock.seconds)
                checkpoint.save(seed.folder / "checkpoints", event.state, progress)
                saved = time.monotonic()
                clock.start()
                if stopping():  # after the last step, too: the next start saves the modules
                    raise Stopped(f"stopped and saved at step {event.step:,} of {total:,}")
    if config.train.export == "best" and not _is_best(event.history, primary):
        trainable = files.read_leaves(seed.folder / BEST)
        event = event._replace(state=event.state._replace(trainable=trainable), logits=None)
    if event.logits is None:  # of the best epoch; or stopped between the last checkpoint and the end of the run
        logits = evaluate(steps.eval, event.state.trainable, parts.frozen, seed.data.dev, seed.data.eval_buckets)
        event = event._replace(logits=logits)
    return event


def _is_best(history: Sequence[dict[str, Any]], primary: str) -> bool:
    """Whether the last epoch is the best so far; of equal ones, the first is."""
    return all(row[primary] < history[-1][primary] for row in history[:-1])


def mend_log(workdir: Path, seed: int, history: Sequence[dict[str, Any]], reached: int) -> bool:
    """Drops what `metrics.jsonl` has of a seed beyond a step, and adds what it lacks of its epochs.

    Returns:
      Whether it lacked any.

    Raises:
      UserError: if something else than a file is in its place.
    """
    path = workdir / LOG
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: delete it")
    found: list[dict[str, Any]] = []

    def keep(row: Any) -> bool:
        kept = row["seed"] != seed or row["step"] <= reached
        if kept:
            found.append(row)
        return kept

    files.keep_lines(path, keep)
    lacking = [row for each in history if (row := {"seed": seed, **each}) not in found]
    for row in lacking:
        files.append_json(path, row)
    return bool(lacking)


class Log:
    """The lines of one seed in `metrics.jsonl`; what an interrupted run wrote beyond its checkpoint is dropped.

    With `config.train.tensorboard`, the same numbers go to `seed_<n>/tensorboard`.
    """

    def __init__(self, seed: Seed, reached: int, history: Sequence[dict[str, Any]]):
        self._path, self._seed, self._writer = seed.workdir / LOG, seed.seed, None
        if mend_log(seed.workdir, seed.seed, history, reached):
            seed.console.warn(f"{self._path} lacked epochs of seed {seed.seed}, which were added")
        if seed.config.train.tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(seed.folder / "tensorboard"), purge_step=reached + 1)

    def write(self, event: Event) -> None:
        """Appends the row of an epoch, and of every `LOG_EVERY`th step."""
        first = event.step - len(event.losses) + 1
        for at, loss, norm in zip(range(first, event.step + 1), event.losses, event.grad_norms, strict=True):
            if at % LOG_EVERY == 0:
                self._append({"epoch": event.epoch, "step": at, "loss": loss, "grad_norm": norm})
        if event.row is not None:
            self._append(event.row)

    def _append(self, row: dict[str, Any]) -> None:
        files.append_json(self._path, {"seed": self._seed, **row})
        if self._writer is not None:
            for name in row.keys() - {"epoch", "step"}:
                self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()
