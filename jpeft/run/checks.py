"""The check of a run's config that comes before any work: for the first field that cannot be, one line."""

import importlib.util
from typing import Any

from ml_collections import ConfigDict

from jpeft.core.errors import UserError, nearest
from jpeft.core.quantised import KINDS
from jpeft.core.tree import flatten
from jpeft.data.kinds import KINDS as ANSWERS
from jpeft.data.tasks import TASKS
from jpeft.plans import plan as plans
from jpeft.run import config as configs
from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS, MODULES, RENAMED

__all__ = ["check", "check_names"]

MOST_SEEDS = 1000
ITEMS = {"candidates": str, "rates": float, "sizes": float, "text": str}  # what the tuples among the fields hold
OWN = {"train": "a CSV, TSV, JSON lines, parquet or CoNLL file", "text": "one or two column names"}


def check(config: Config) -> None:
    """Checks everything that can be checked without data or weights.

    Raises:
      UserError: for the first field that cannot be, with what it could be.
    """
    _check_fields(config, configs.default("mrpc", "head"), "config")
    check_names(config)
    _check_data(config)
    _check_quantised(config)
    for method in MODULES:
        try:
            plans.make(method, **configs.options(config, method))
        except UserError as error:
            raise UserError(f"config.peft.{method}: {error}") from None
    _check_fishpal(config)
    _check_train(config)
    _check_seeds(config.seeds)
    _check_read(config)


def _check_fishpal(config: Config) -> None:
    own = config.fishpal
    for candidate in own.candidates:
        if candidate not in MODULES:
            raise UserError(f"config.fishpal.candidates: {candidate!r} is unknown: {nearest(candidate, MODULES)}")
        try:
            plans.layered(candidate)
        except UserError as error:
            raise UserError(f"config.fishpal.candidates: {error}") from None
    if len(set(own.candidates)) < len(own.candidates) or not own.candidates:
        raise UserError("config.fishpal.candidates must name at least one method, and none twice")
    if own.plan is not None:
        plans.read(own.plan)
    if own.criterion not in configs.CRITERIA:
        told = nearest(own.criterion, configs.CRITERIA)
        raise UserError(f"config.fishpal.criterion {own.criterion!r} is unknown: {told}")
    if len(set(own.sizes)) < len(own.sizes):
        raise UserError(f"config.fishpal.sizes must be distinct, got {tuple(own.sizes)}")
    if not own.sizes:
        raise UserError("config.fishpal.sizes must name at least one size, such as (1,)")
    for size in own.sizes:
        _above_zero("fishpal.sizes", size)
    try:
        configs.candidates(config)
    except UserError as error:
        raise UserError(f"config.fishpal.sizes: {error}") from None
    if own.rates is not None:
        if not own.rates or len(set(own.rates)) < len(own.rates):
            raise UserError(f"config.fishpal.rates must be distinct, at least one, got {tuple(own.rates)}")
        for rate in own.rates:
            _above_zero("fishpal.rates", rate)
    for name, rate in own.learning_rates.items():
        if rate is not None:
            _above_zero(f"fishpal.learning_rates.{name}", rate)
    for name, factor in own.factors.items():
        _above_zero(f"fishpal.factors.{name}", factor)
    _within(1, 10**9, "fishpal.num_examples", own.num_examples)
    if own.budget_of not in ("trainable", "added"):
        raise UserError(f"config.fishpal.budget_of must be 'trainable' or 'added', got {own.budget_of!r}")
    if own.budget is not None:
        configs.budget(config)
        for name in own.candidates if own.criterion != "race" else ():
            if configs.options(config, name).get("rank_pattern"):
                raise UserError(
                    f"config.fishpal.budget takes a candidate to be of one size in all layers, which {name} with a "
                    "rank_pattern is not: drop one of them"
                )


def _check_train(config: Config) -> None:
    own = config.train
    _within(1, 10**5, "train.num_epochs", own.num_epochs)
    _within(1, 2**14, "train.batch_size", own.batch_size)
    _within(1, 32, "train.padded_lengths", own.padded_lengths)
    if own.group_by_length and own.padded_lengths is not None:
        raise UserError("config.train.padded_lengths is of random batches: leave it out with train.group_by_length")
    _within(1, 10**9, "train.max_train_examples", own.max_train_examples)
    _within(1, 10**4, "train.together", own.together)
    _within(8, 2**16, "train.max_length", own.max_length)
    _within(0, 100, "train.weight_decay", own.weight_decay)
    _above_zero("train.learning_rate", configs.learning_rate(config))
    if not 0 <= own.warmup_ratio < 1:
        raise UserError(f"config.train.warmup_ratio must be at least 0 and below 1, got {own.warmup_ratio}")
    if own.export not in ("last", "best"):
        raise UserError(f"config.train.export must be 'last' or 'best', got {own.export!r}")
    if own.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("config.train.tensorboard needs tensorboardX: pip install tensorboardX")
    if own.dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"config.train.dtype must be 'float32' or 'bfloat16', got {own.dtype!r}")


def _check_fields(config: Config, standard: Config, path: str) -> None:
    """Checks that a config has the fields of `default`, of their types: a file may have made it from scratch."""
    for name in config:
        if name not in standard:
            raise UserError(f"{path}.{name} is not a field of the config: {nearest(name, standard)}")
    for name in standard:
        if name not in config:
            raise UserError(f"{path}.{name} is missing: start from the config that configs.default() makes")
        value, kind = config[name], standard.get_type(name)
        if isinstance(standard[name], ConfigDict) and isinstance(value, ConfigDict):
            _check_fields(value, standard[name], f"{path}.{name}")
        elif path.startswith("config.peft."):
            continue  # the signatures of the methods say what fits
        elif not (value is None and standard[name] is None) and not _is_a(value, kind):
            raise UserError(f"{path}.{name} must be of type {kind.__name__}, got {value!r:.60}")
        of = ITEMS.get(name)
        if of and value is not None and not all(_is_a(item, of) for item in value):
            raise UserError(f"{path}.{name} must be a tuple of type {of.__name__}, got {value!r:.60}")


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is dict:
        return isinstance(value, dict | ConfigDict)
    if kind is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, int | float if kind is float else kind)


def check_names(config: Config) -> None:
    """Checks that the task and the method exist.

    Raises:
      UserError: if one does not, with the nearest that does.
    """
    known = [*TASKS, configs.CUSTOM]
    if config.task not in known and not config.task.endswith(".py"):
        raise UserError(f"config.task {config.task!r} is unknown: {nearest(config.task, known)}")
    parts = config.method.split("+")
    for part in parts:
        known = tuple(METHODS) if len(parts) == 1 else MODULES
        if part in RENAMED:
            raise UserError(f"config.method {part!r} is called {RENAMED[part]!r}")
        if part in METHODS and part not in known:
            raise UserError(f"config.method {config.method!r}: {part!r} stands alone and cannot be joined by '+'")
        if part not in known:
            raise UserError(f"config.method {part!r} is unknown: {nearest(part, known)}")
    if twice := next((part for part in parts if parts.count(part) > 1), None):
        raise UserError(f"config.method {config.method!r} names {twice!r} twice: set its size in config.peft.{twice}")


def _check_data(config: Config) -> None:
    standard = configs.default("mnli", "head").data
    given = [name for name in standard if config.data[name] != standard[name]]
    if config.task == "synthetic":
        read = ()
    elif config.task == configs.CUSTOM:
        read = tuple(name for name in standard if name != "path")
    else:
        read = ("path",)
    unread = [name for name in given if name not in read]
    if unread:
        raise UserError(f"config.data.{unread[0]} is set, but config.task {config.task!r} does not read it: drop it")
    if config.data.validation is not None:
        for name in ("validation_fraction", "split_seed"):
            if name in given:
                raise UserError(f"config.data.{name} is set, and so is config.data.validation: drop one")
    if config.data.kind not in ANSWERS:
        raise UserError(f"config.data.kind {config.data.kind!r} is unknown: {nearest(config.data.kind, ANSWERS)}")
    if config.data.kind == "regression" and config.data.labels is not None:
        raise UserError("config.data.labels is set, but a regression has no classes: drop one")
    if config.task == configs.CUSTOM:
        for name in ("train", "text") if config.data.hub is None else ("text",):
            if not config.data[name]:
                raise UserError(f"config.task 'custom' needs config.data.{name}: expected {OWN[name]}")


def _check_quantised(config: Config) -> None:
    kind, pattern = config.quantise, config.quantise_except
    if kind is None:
        if pattern is not None:
            raise UserError("config.quantise_except is set, but config.quantise is not: drop it")
        return
    if kind not in KINDS:
        raise UserError(f"config.quantise {kind!r} is unknown: {nearest(kind, KINDS)}")
    if configs.first_method(config).trains_base:
        raise UserError(
            f"config.quantise is set, but config.method {config.method!r} trains the kernels themselves, and codes "
            "cannot train: drop it, or train modules, such as 'lora'"
        )


def _check_seeds(seeds: Any) -> None:
    sequence = isinstance(seeds, tuple | list)
    if not sequence or not seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"config.seeds must be a tuple of integers from 0 to 2**32 - 1, at least one, got {seeds!r}")
    if len(seeds) > MOST_SEEDS:
        raise UserError(f"config.seeds must be at most {MOST_SEEDS:,}, got {len(seeds):,}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"config.seeds must be distinct, got {seeds!r}")


def _check_read(config: Config) -> None:
    """Raises a UserError for an option that is set, and that nothing in this run reads."""
    parts = config.method.split("+")
    measures = METHODS[parts[0]].chooses and config.fishpal.plan is None
    read = config.fishpal.candidates if measures else parts
    for method in MODULES:
        for name in configs.options(config, method):
            if method not in read:
                raise UserError(f"config.peft.{method}.{name} is set, but {_reader(config)}: drop it")
            if measures and name == "layers":
                raise UserError(f"config.peft.{method}.layers is set, but fishpal itself chooses the layers: drop it")
    standard, given = (flatten(c.fishpal.to_dict()) for c in (configs.default(config.task, config.method), config))
    for names, value in given.items():
        reason = _unread(config, names[0])
        if names[0] in ("factors", "learning_rates") and config.fishpal.plan is None and names[1] not in read:
            reason = reason or f"{names[1]!r} is not one of config.fishpal.candidates"
        if names[0] == "learning_rates" and value is not None and config.fishpal.plan is not None:
            kinds = {entry.method for entries in plans.read(config.fishpal.plan).values() for entry in entries}
            reason = reason or (None if names[1] in kinds else f"{names[1]!r} is not in config.fishpal.plan")
        if value != standard[names] and reason:
            raise UserError(f"config.fishpal.{'.'.join(names)} is set, but {reason}: drop it")


def _unread(config: Config, name: str) -> str | None:
    """Why this run reads no such field of `config.fishpal`; None if it does."""
    own = config.fishpal
    if not configs.first_method(config).chooses:
        return f"config.method is {config.method!r}"
    if own.plan is not None and name not in ("plan", "criterion", "learning_rates"):
        return "config.fishpal.plan is set, and nothing is chosen"
    if own.plan is not None and name == "criterion" and own.criterion != "thesis":  # which has one rate for all
        return "config.fishpal.plan is set, and nothing is chosen"
    if name == "factors" and own.criterion != "thesis":
        return f"config.fishpal.criterion is {own.criterion!r}, and only the thesis' has factors"
    if name == "learning_rates" and own.criterion == "thesis":
        return "with the thesis' criterion there is one rate for all"
    if name == "rates" and own.criterion != "race":
        return f"config.fishpal.criterion is {own.criterion!r}, and only a race tries rates"
    if name == "rates" and own.rates is not None and configs.raced_rates(config) != tuple(own.rates):
        return "a learning rate is given"
    if name == "num_examples" and own.criterion in ("race", "loss_drop"):
        return f"config.fishpal.criterion {own.criterion!r} says itself how many examples it trains on"
    if name == "num_examples" and own.criterion in ("random", "size", "magnitude", "depth"):
        return f"config.fishpal.criterion {own.criterion!r} looks at no examples"
    if name == "budget_of" and own.budget is None:
        return "config.fishpal.budget is not"
    return None


def _reader(config: Config) -> str:
    if not configs.first_method(config).chooses:
        return f"config.method is {config.method!r}"
    if config.fishpal.plan is not None:
        return "config.fishpal.plan brings its own options"
    return f"config.fishpal.candidates are {', '.join(config.fishpal.candidates)}"


def _within(least: float, most: float, name: str, value: float | None) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(f"config.{name} must be from {least:,} to {most:,}, got {value}")


def _above_zero(name: str, value: float) -> None:
    if not 1e-30 < value < 1e6:  # a smaller one is 0 in float32, as are its products
        raise UserError(f"config.{name} must be above 0 and below 1,000,000, got {value}")
