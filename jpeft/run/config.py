"""The configuration of a run: its fields and defaults, and the check that comes before any work."""

import importlib.util
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jpeft.core.errors import UserError, nearest
from jpeft.core.tree import flatten
from jpeft.data import tasks
from jpeft.data.custom import custom
from jpeft.data.task import Task
from jpeft.data.tasks import TASKS
from jpeft.plans import plan as plans
from jpeft.plans.fishpal import FACTORS, Candidates
from jpeft.transforms.registry import METHODS, MODULES, RENAMED

__all__ = [
    "Config",
    "check",
    "check_names",
    "default",
    "demo",
    "learning_rate",
    "method_names",
    "modules",
    "options",
    "rates",
    "task_of",
    "variant",
]

MOST_SEEDS = 1000
ITEMS = {"candidates": str, "sizes": float, "text": str}  # what the tuples among the fields hold
CUSTOM = "custom"  # the task that `config.data` defines
# What FishPAL can choose by; `jpeft.run.criteria` says how.
CRITERIA = (
    "race", "adam_step", "loss_drop", "trace", "thesis", "random", "size", "magnitude", "depth", "shuffled_labels",
)  # fmt: skip
OWN = {"train": "a CSV, TSV, JSON lines or parquet file", "text": "one or two column names"}

Config = Any  # an `ml_collections.ConfigDict`, whose fields are attributes that no type checker knows


def method_names() -> tuple[str, ...]:
    """What `config.method` can be; several modules can be joined by "+", such as "houlsby+layer_norm"."""
    return tuple(METHODS)


def default(task: str, method: str) -> Config:
    """A run with the recipe of the FishPAL thesis; a file under `configs/` changes what its experiment changes.

    Fields that are None take a value that is known later: `data.path` the hub or JPEFT_GLUE_DIR, `train.learning_rate`
    the method's own, `init_from` new modules, or those of another run's model folder,
    `train.max_train_examples` all, `fishpal.plan` the plan that `fishpal.criterion` finds,
    `fishpal.num_examples` what the criterion needs, `fishpal.budget` no limit.

    `train.export` says which epoch's modules are saved in the end: the last, or the best on the evaluation split.
    `train.group_by_length=False` pads all rows to one length, so that batches are random: slower, but for comparison.
    `train.together` is how many seeds train at once at most, in one program with one base model; None is as many as
    fit on an accelerator, and one on a CPU.
    All devices of a machine divide the rows of a batch; with `train.shard_base` they hold the base model in parts.
    `train.remat` recomputes each layer in the backward pass; `train.tensorboard` writes the log for it, too.
    """
    return ConfigDict(
        {
            "task": task,
            "model": "bert-base-uncased",
            "method": method,
            "init_from": placeholder(str),
            "data": {
                "path": placeholder(str),
                "train": placeholder(str),
                "validation": placeholder(str),
                "test": placeholder(str),
                "text": placeholder(tuple),
                "label": placeholder(str),
                "labels": placeholder(tuple),
                "regression": False,
                "validation_fraction": 0.1,
                "split_seed": 0,
            },
            "peft": {name: _section(name) for name in MODULES},
            "fishpal": {
                "candidates": ("lora", "pfeiffer", "prefix"),  # the first one where a race finds no difference
                "criterion": "race",
                "sizes": (1,),
                "budget": placeholder(str),
                "budget_of": "trainable",
                "num_examples": placeholder(int),
                "plan": placeholder(str),
                "factors": {name: FACTORS.get(name, 1.0) for name in MODULES},
                "learning_rates": {name: placeholder(float) for name in MODULES},
            },
            "train": {
                "num_epochs": 10,
                "batch_size": 16,
                "learning_rate": placeholder(float),
                "warmup_ratio": 0.06,
                "weight_decay": 0.1,
                "max_length": 128,
                "group_by_length": True,
                "max_train_examples": placeholder(int),
                "dtype": "float32",
                "remat": False,
                "export": "last",
                "tensorboard": False,
                "together": placeholder(int),
                "shard_base": False,
            },
            "seeds": (11,),
        }
    )


def _section(method: str) -> ConfigDict:
    """The options of a method with their defaults, from its signature."""
    make: Any = METHODS[method].make
    hints = get_type_hints(make)
    section = ConfigDict()
    for name, parameter in inspect.signature(make).parameters.items():
        section[name] = _placeholder(hints[name]) if parameter.default is None else parameter.default
    return section


def _placeholder(hint: Any) -> Any:
    """A field that is None and takes a value of the other type in `hint`, `int | None` for instance."""
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    of = get_origin(kinds[0]) or kinds[0]
    return placeholder({Sequence: tuple, Mapping: dict}.get(of, of))


def demo(config: Config) -> Config:
    """The same method at a size for two CPU cores: packaged MiniLM weights and the built-in data, no network.

    A thousand steps want a higher learning rate than a full recipe: four times the method's own. Batches are random:
    the lengths of the built-in sentences go with their forms and labels, and rows of one length teach less together.
    """
    config.task = "synthetic"
    config.model = "minilm"
    config.train.learning_rate = None
    config.train.update(num_epochs=4, max_length=64, learning_rate=4 * learning_rate(config))
    config.train.group_by_length = False
    config.seeds = (11,)
    return config


def variant(config: Config, name: str) -> Config:
    """What stands after the colon of `--config file.py:name`: nothing, or "demo".

    Raises:
      UserError: if it is anything else.
    """
    if name not in ("", "demo"):
        raise UserError(f"config variant {name!r} is unknown: {nearest(name, ['demo'])}")
    return demo(config) if name else config


def learning_rate(config: Config) -> float:
    """The configured learning rate, or the method's own; of several methods, the first one's."""
    if config.train.learning_rate is not None:
        return config.train.learning_rate
    return METHODS[config.method.split("+")[0]].learning_rate


def rates(config: Config) -> dict[str, float]:
    """{method: factor} on the learning rate, for runs whose layers hold modules of different kinds.

    Each kind trains at its own rate, `config.fishpal.learning_rates`. Where that is None, it is the method's own, times
    what the configured learning rate is to fishpal's. With the criterion of the thesis there is one rate for all.
    """
    own = METHODS[config.method.split("+")[0]]
    if not own.chooses or config.fishpal.criterion == "thesis":
        return {}
    given, base = config.fishpal.learning_rates, learning_rate(config)
    return {
        name: METHODS[name].learning_rate / own.learning_rate if given[name] is None else given[name] / base
        for name in MODULES
    }


def candidates(config: Config) -> Candidates:
    """The candidates by name, each in all of `config.fishpal.sizes`: "lora", and "lora x2" of twice its rank."""
    found = {}
    for name in config.fishpal.candidates:
        for size in config.fishpal.sizes:
            entry = plans.Entry(name, options(config, name))
            found[name if size == 1 else f"{name} x{size:g}"] = entry if size == 1 else plans.resized(entry, size)
    return found


def budget(config: Config) -> tuple[float, bool]:
    """The number in `config.fishpal.budget`, "0.5%" or "100000", and whether it is in percent of the plain model.

    Raises:
      UserError: if it is neither.
    """
    text = str(config.fishpal.budget)
    try:
        number = float(text.removesuffix("%").replace(",", "").replace("_", ""))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"config.fishpal.budget must be a number of parameters or a percentage, '0.5%', got {text!r}")
    return number, text.endswith("%")


def modules(config: Config) -> plans.Spec:
    """What `jpeft.build` makes the configured method from; nothing for `full` and `head`."""
    if METHODS[config.method.split("+")[0]].make is None:
        return []
    return [{"method": name, "options": options(config, name)} for name in config.method.split("+")]


def options(config: Config, method: str) -> dict[str, Any]:
    """The options of a method that differ from its defaults, so that plans show only what was chosen."""
    make: Any = METHODS[method].make
    standard = inspect.signature(make).parameters
    given = config.peft[method].to_dict()
    return {name: value for name, value in given.items() if value != standard[name].default}


def check(config: Config) -> None:
    """Checks everything that can be checked without data or weights.

    Raises:
      UserError: for the first field that cannot be, with what it could be.
    """
    _check_fields(config, default("mrpc", "head"), "config")
    check_names(config)
    _check_data(config)
    for method in MODULES:
        try:
            plans.make(method, **options(config, method))
        except UserError as error:
            raise UserError(f"config.peft.{method}: {error}") from None
    for candidate in config.fishpal.candidates:
        if candidate not in MODULES:
            raise UserError(f"config.fishpal.candidates: {candidate!r} is unknown: {nearest(candidate, MODULES)}")
    if len(set(config.fishpal.candidates)) < len(config.fishpal.candidates) or not config.fishpal.candidates:
        raise UserError("config.fishpal.candidates must name at least one method, and none twice")
    if config.fishpal.plan is not None:
        plans.read(config.fishpal.plan)
    if config.fishpal.criterion not in CRITERIA:
        raise UserError(
            f"config.fishpal.criterion {config.fishpal.criterion!r} is unknown: "
            f"{nearest(config.fishpal.criterion, CRITERIA)}"
        )
    if not config.fishpal.sizes:
        raise UserError("config.fishpal.sizes must name at least one size, such as (1,)")
    for size in config.fishpal.sizes:
        _above_zero("fishpal.sizes", size)
    try:
        candidates(config)
    except UserError as error:
        raise UserError(f"config.fishpal.sizes: {error}") from None
    if config.fishpal.budget is not None:
        budget(config)
    if config.fishpal.budget_of not in ("trainable", "added"):
        raise UserError(f"config.fishpal.budget_of must be 'trainable' or 'added', got {config.fishpal.budget_of!r}")
    for name, rate in config.fishpal.learning_rates.items():
        if rate is not None:
            _above_zero(f"fishpal.learning_rates.{name}", rate)
    train = config.train
    _within(1, 10**9, "fishpal.num_examples", config.fishpal.num_examples)
    _within(1, 10**5, "train.num_epochs", train.num_epochs)
    _within(1, 2**14, "train.batch_size", train.batch_size)
    _within(1, 10**9, "train.max_train_examples", train.max_train_examples)
    _within(1, 10**4, "train.together", train.together)
    _within(8, 2**16, "train.max_length", train.max_length)
    _within(0, 100, "train.weight_decay", train.weight_decay)
    for name, factor in config.fishpal.factors.items():
        _above_zero(f"fishpal.factors.{name}", factor)
    _above_zero("train.learning_rate", learning_rate(config))
    if not 0 <= train.warmup_ratio < 1:
        raise UserError(f"config.train.warmup_ratio must be at least 0 and below 1, got {train.warmup_ratio}")
    if train.export not in ("last", "best"):
        raise UserError(f"config.train.export must be 'last' or 'best', got {train.export!r}")
    if train.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("config.train.tensorboard needs tensorboardX: pip install tensorboardX")
    if train.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.train.dtype must be 'float32' or 'bfloat16', got {train.dtype!r}")
    _check_seeds(config.seeds)
    _check_read(config)


def _check_fields(config: Config, standard: Config, path: str) -> None:
    """Checks that a config has the fields of `default`, of their types: a file may have made it from scratch."""
    for name in config:
        if name not in standard:
            raise UserError(f"{path}.{name} is not a field of the config: {nearest(name, standard)}")
    for name in standard:
        if name not in config:
            raise UserError(f"{path}.{name} is missing: start from the config that default() makes")
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


def task_of(config: Config) -> Task:
    """The configured task: one of GLUE's, the user's own files, or what a Python file of theirs defines.

    Raises:
      UserError: if there is no such task, or its files are not what the config says.
    """
    data = config.data
    if config.task == CUSTOM:
        labels = None if data.labels is None else _listed(tuple(map(str, data.labels)))
        return custom(
            data.train, _listed(data.text), data.label or "label", validation=data.validation, test=data.test,
            labels=labels, regression=data.regression, validation_fraction=data.validation_fraction,
            split_seed=data.split_seed,
        )  # fmt: skip
    return tasks.read_task(config.task) if config.task.endswith(".py") else tasks.task(config.task)


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    """Names, also those that the command line gives in one piece: --config.data.text=premise,hypothesis."""
    return tuple(names[0].split(",")) if len(names) == 1 else tuple(names)


def check_names(config: Config) -> None:
    """Checks that the task and the method exist.

    Raises:
      UserError: if one does not, with the nearest that does.
    """
    known = [*TASKS, CUSTOM]
    if config.task not in known and not config.task.endswith(".py"):
        raise UserError(f"config.task {config.task!r} is unknown: {nearest(config.task, known)}")
    parts = config.method.split("+")
    for part in parts:
        known = method_names() if len(parts) == 1 else MODULES
        if part in RENAMED:
            raise UserError(f"config.method {part!r} is called {RENAMED[part]!r}")
        if part in METHODS and part not in known:
            raise UserError(f"config.method {config.method!r}: {part!r} stands alone and cannot be joined by '+'")
        if part not in known:
            raise UserError(f"config.method {part!r} is unknown: {nearest(part, known)}")


def _check_data(config: Config) -> None:
    standard = default("mnli", "head").data
    given = [name for name in standard if config.data[name] != standard[name]]
    unread = [name for name in given if (name == "path") == (config.task == CUSTOM) or config.task == "synthetic"]
    if unread:
        raise UserError(f"config.data.{unread[0]} is set, but config.task {config.task!r} does not read it: drop it")
    if config.data.validation is not None:
        for name in ("validation_fraction", "split_seed"):
            if name in given:
                raise UserError(f"config.data.{name} is set, but config.data.validation is a file: drop one")
    if config.data.regression and config.data.labels is not None:
        raise UserError("config.data.labels is set, but a regression has no classes: drop one")
    if config.task == CUSTOM:
        for name in ("train", "text"):
            if not config.data[name]:
                raise UserError(f"config.task 'custom' needs config.data.{name}: expected {OWN[name]}")


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
        for name in options(config, method):
            if method not in read:
                raise UserError(f"config.peft.{method}.{name} is set, but {_reader(config)}: drop it")
            if measures and name == "layers":
                raise UserError(f"config.peft.{method}.layers is set, but fishpal itself chooses the layers: drop it")
    standard, given = (flatten(c.fishpal.to_dict()) for c in (default(config.task, config.method), config))
    for names, value in given.items():
        if value != standard[names] and (reason := _unread(config, names[0])):
            raise UserError(f"config.fishpal.{'.'.join(names)} is set, but {reason}: drop it")


def _unread(config: Config, name: str) -> str | None:
    """Why this run reads no such field of `config.fishpal`; None if it does."""
    own = config.fishpal
    if not METHODS[config.method.split("+")[0]].chooses:
        return f"config.method is {config.method!r}"
    if own.plan is not None and name not in ("plan", "criterion", "learning_rates"):
        return "config.fishpal.plan is set, and nothing is chosen"
    if name == "factors" and own.criterion != "thesis":
        return f"config.fishpal.criterion is {own.criterion!r}, and only the thesis' has factors"
    if name == "learning_rates" and own.criterion == "thesis":
        return "with the thesis' criterion there is one rate for all"
    if name == "num_examples" and own.criterion == "race":
        return "a race says itself how many examples it trains on"
    if name == "budget_of" and own.budget is None:
        return "config.fishpal.budget is not"
    return None


def _reader(config: Config) -> str:
    if not METHODS[config.method.split("+")[0]].chooses:
        return f"config.method is {config.method!r}"
    if config.fishpal.plan is not None:
        return "config.fishpal.plan brings its own options"
    return f"config.fishpal.candidates are {', '.join(config.fishpal.candidates)}"


def _within(least: float, most: float, name: str, value: float | None) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(f"config.{name} must be from {least:,} to {most:,}, got {value}")


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < 1e6:
        raise UserError(f"config.{name} must be above 0 and below 1,000,000, got {value}")
