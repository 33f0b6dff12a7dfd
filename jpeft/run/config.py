"""The configuration of a run: its fields and their defaults, and what they mean."""

import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import jax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jpeft.core.errors import UserError, nearest
from jpeft.core.tree import flatten
from jpeft.data import hub, tasks
from jpeft.data.custom import custom
from jpeft.data.task import Task
from jpeft.models import BertConfig
from jpeft.plans import plan as plans
from jpeft.plans.fishpal import FACTORS, Candidates
from jpeft.transforms.registry import METHODS, MODULES, Method, defaults
from jpeft.version import RESULTS

__all__ = [
    "CRITERIA",
    "CUSTOM",
    "Config",
    "budget",
    "candidates",
    "chosen",
    "default",
    "demo",
    "dtype",
    "first_method",
    "learning_rate",
    "modules",
    "named",
    "options",
    "raced_rates",
    "rates",
    "results",
    "split_names",
    "task_of",
    "variant",
]

LONG = 2000  # steps, from which on kinds may race
RATES = (1, 4)  # that race; the first one is kept where they find no difference
MOST_EPOCHS = 5  # of runs in which these race: in ten, a higher one learns the rows by heart (docs/choice.md)
CUSTOM = "custom"  # the task that `config.data` defines
# What FishPAL can choose by; `jpeft.run.criteria` says how.
CRITERIA = (
    "race", "adam_step", "loss_drop", "kernel", "trace", "thesis",
    "random", "size", "magnitude", "depth", "shuffled_labels",
)  # fmt: skip

Config = Any  # an `ml_collections.ConfigDict`, whose fields are attributes that no type checker knows


def default(task: str, method: str) -> Config:
    """A run with the recipe of the FishPAL thesis; a file under `configs/` changes what its experiment changes.

    Fields that are None take the value that is named here.

    - `task`: the name of one of GLUE, `synthetic`, `custom` (what `data` says), or a Python file with `get_task()`.
    - `model`: a name on the Hugging Face hub, a folder with safetensors, or `minilm`, if its package is installed.
    - `method`: names joined by "+", or `full`, `head`, `fishpal`.
    - `init_from`: the model folder of another run, whose modules training starts from; None: new ones.
    - `quantise`: holds the encoder's kernels in codes, "nf4", "fp4" (QLoRA, 0.13 of their memory) or "int8" (0.25), and
      any method but `full` trains on top; None: no codes.
    - `quantise_except`: a pattern of layers that stay as they are; None: none.
    - `data.path`: a folder with GLUE's files; None: that in JPEFT_GLUE_DIR, or else the hub.
    - `data.hub`: a data set of the hub in the place of files, "owner/name", "owner/name:config", or a folder that
      `datasets` reads; None: files.
    - `data.train`: a file to train on, or the hub's name of the split.
    - `data.validation`: a file to evaluate on, or the hub's name of the split; None: a share of the training rows.
    - `data.test`: a file whose rows are scored at the end, or the hub's name of the split; None: none.
    - `data.text`: the column with the text, or two of a pair.
    - `data.label`: the column with the answers.
    - `data.labels`: the names of the classes, in the order of their ids; None: those in the training rows, sorted.
    - `data.kind`: the kind of the answers: classification, regression, multilabel or tagging.
    - `data.validation_fraction`: the share of the training rows to validate on, where there is no file for it.
    - `data.split_seed`: decides which rows these are.
    - `peft`: the options of each method. Its function says what they mean: `help(jpeft.lora)`.
    - `fishpal.candidates`: the methods to choose from. Where a race finds no difference, the first one wins.
    - `fishpal.criterion`: what to choose by (`jpeft.run.criteria`); `thesis` is the rule of the thesis.
    - `fishpal.sizes`: the sizes that each candidate comes in, as multiples of its own, such as (0.5, 1, 2).
    - `fishpal.rates`: the multiples of the methods' own learning rates that race, unless `train.learning_rate` or one
      of `fishpal.learning_rates` is given. None: (1, 4) in runs of up to five epochs, and no race of rates in longer
      ones.
    - `fishpal.budget`: the most parameters that a plan may have, a number or a percentage of the model's ("0.3%");
      None: no limit.
    - `fishpal.budget_of`: whether it counts parameters that are "trainable", or "added" at inference.
    - `fishpal.num_examples`: how many training examples to measure on; None: what the criterion needs.
    - `fishpal.plan`: a plan, or a file with one, in the place of a choice; None: a choice.
    - `fishpal.factors`: what the rule of the thesis multiplies each method's Fisher information by.
    - `fishpal.learning_rates`: the learning rate of each method in a plan; None: the method's own, times what
      `train.learning_rate` is to that of `fishpal`.
    - `train.num_epochs`: passes over the training rows.
    - `train.batch_size`: the rows of a step.
    - `train.learning_rate`: the highest rate of the schedule; None: the method's own.
    - `train.warmup_ratio`: the share of the steps in which the rate rises from 0; it falls to 0 in the others.
    - `train.weight_decay`: the weight decay of AdamW.
    - `train.max_length`: the most tokens of a row; longer ones are cut.
    - `train.padded_lengths`: how many lengths the rows of one batch are padded to at most. None: 4 on a CPU, where
      tokens are dear, and 1 elsewhere, where short parts leave the device idle.
    - `train.group_by_length`: whether rows of similar length meet in a batch, which wastes hardly any padding and may
      cost accuracy (docs/design.md). Otherwise batches are random.
    - `train.max_train_examples`: a sample of so many training rows, the same for all seeds; None: all.
    - `train.dtype`: what the encoder computes in; None: float32 on a CPU, bfloat16 on an accelerator.
    - `train.cache_frozen_layers`: computes the layers below the lowest one that trains once for each row, without
      dropout, and keeps what they return in memory: `head` trains about three times as fast.
    - `train.remat`: recomputes each layer in the backward pass, which takes less memory and more time.
    - `train.export`: which epoch's modules are saved in the end: "last", or "best" on the evaluation split.
    - `train.tensorboard`: also writes the log for TensorBoard.
    - `train.together`: how many seeds train at once at most, in one program with one base model; None: as many as fit
      on an accelerator, and one on a CPU.
    - `train.shard_base`: where several devices divide the rows of a batch, they hold the base model in parts, too.
    - `seeds`: a run for each; the report has their mean.
    """
    return ConfigDict(
        {
            "task": task,
            "model": "bert-base-uncased",
            "method": method,
            "init_from": placeholder(str),
            "quantise": placeholder(str),
            "quantise_except": placeholder(str),
            "data": {
                "path": placeholder(str),
                "hub": placeholder(str),
                "train": placeholder(str),
                "validation": placeholder(str),
                "test": placeholder(str),
                "text": placeholder(tuple),
                "label": placeholder(str),
                "labels": placeholder(tuple),
                "kind": "classification",
                "validation_fraction": 0.1,
                "split_seed": 0,
            },
            "peft": {name: _section(name) for name in MODULES},
            "fishpal": {
                "candidates": ("lora", "pfeiffer", "prefix"),  # the first one where a race finds no difference
                "criterion": "race",
                "sizes": (1,),
                "rates": placeholder(tuple),
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
                "padded_lengths": placeholder(int),
                "group_by_length": False,
                "max_train_examples": placeholder(int),
                "dtype": placeholder(str),
                "cache_frozen_layers": False,
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
    section = ConfigDict()
    for name, default, kind in _options(method):
        section[name] = placeholder(kind) if default is None else default
    return section


@functools.cache  # a grid makes thousands of configs
def _options(method: str) -> list[tuple[str, Any, type]]:
    """Of every option of a method: its name, its default, and the type of its values besides None."""
    hints = get_type_hints(METHODS[method].make)
    return [(name, default, _kind(hints[name])) for name, default in defaults(method).items()]


def _kind(hint: Any) -> type:
    """The type besides None in a hint, such as `int | None`."""
    (kind, *_) = [kind for kind in get_args(hint) if kind is not types.NoneType] or [hint]
    of = get_origin(kind) or kind
    return {Sequence: tuple, Mapping: dict}.get(of, of)


def demo(config: Config) -> Config:
    """The same method at a size for two CPU cores: packaged MiniLM weights and the built-in data, no network."""
    config.task = "synthetic"
    config.model = "minilm"
    config.train.update(num_epochs=3, max_length=64)
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


def dtype(config: Config) -> str:
    """What the encoder computes in. What trains, and the state of its optimiser, is float32 in any case."""
    if config.train.dtype is not None:
        return config.train.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def chosen(config: Config) -> dict[str, Any]:
    """The fields that are not the defaults, by name: those that a later version adds, or this machine sets, too."""
    standard, now = (x.to_dict() for x in (default(config.task, config.method), config))
    now["train"]["dtype"], standard["train"]["dtype"] = dtype(config), "float32"
    now["fishpal"]["rates"], standard["fishpal"]["rates"] = raced_rates(config), (1,)
    known, given = (flatten(x) for x in (standard, now))
    return {".".join(name): x for name, x in given.items() if name not in known or x != known[name]}


def first_method(config: Config) -> Method:
    """The run's method in the registry; of several joined by "+", the first."""
    return METHODS[config.method.split("+")[0]]


def raced_rates(config: Config) -> tuple[float, ...]:
    """The multiples of the methods' own learning rates that race; (1,) where none do.

    That is where nothing races, the rate is given, or the run is so long that the early lead of a higher rate is lost.
    """
    return tuple(config.fishpal.rates or RATES) if _chooses_rate(config) and not _too_long(config) else (1,)


def _chooses_rate(config: Config) -> bool:
    """Whether the run races and no rate is given."""
    if not first_method(config).chooses or config.fishpal.criterion != "race" or config.fishpal.plan is not None:
        return False
    kinds = (config.fishpal.learning_rates[name] for name in config.fishpal.candidates)
    return all(rate is None for rate in (config.train.learning_rate, *kinds))


def _too_long(config: Config) -> bool:
    return config.fishpal.rates is None and config.train.num_epochs > MOST_EPOCHS


def learning_rate(config: Config) -> float:
    """The configured learning rate, or the method's own; of several methods, the first one's."""
    if config.train.learning_rate is not None:
        return config.train.learning_rate
    return first_method(config).learning_rate


def rates(config: Config) -> dict[str, float]:
    """{method: factor} on the learning rate, for runs whose layers hold modules of different kinds.

    Each kind trains at its own rate, `config.fishpal.learning_rates`. Where that is None, it is the method's own, times
    what the configured learning rate is to fishpal's. With the criterion of the thesis there is one rate for all.
    """
    own = first_method(config)
    if not own.chooses or config.fishpal.criterion == "thesis":
        return {}
    given, base = config.fishpal.learning_rates, learning_rate(config)
    return {
        name: METHODS[name].learning_rate / own.learning_rate if given[name] is None else given[name] / base
        for name in MODULES
    }


def named(config: Config) -> set[str]:
    """The methods of a run; where it chooses, those that it may choose."""
    parts = set(config.method.split("+"))
    if not first_method(config).chooses:
        return parts
    if config.fishpal.plan is None:
        return {*config.fishpal.candidates}
    return {entry.method for entries in plans.read(config.fishpal.plan).values() for entry in entries}


def results(config: Config, shape: BertConfig, rows: int = 0) -> int:
    """`jpeft.version.RESULTS`, or a later number if a later change concerns this run.

    Args:
      config: the run's.
      shape: the base model's.
      rows: to train on.
    """
    names, own = named(config), config.fishpal
    if "ladder_side" in names and (shape.hidden_act, shape.layer_norm_eps) != ("gelu", 1e-12):
        return 6  # its blocks take activation and epsilon from the backbone
    if names & {"prompt", "p_tuning"}:
        return 6  # fewer virtual tokens by default
    if names & {"fish", "random_mask", "magnitude_mask", "mam"} and config.train.learning_rate is None:
        return 6  # their own rates have changed
    if names & {"bitfit", "layer_norm", "top_k_layers"} and dtype(config) == "bfloat16":
        return 6  # what trains is cast to the base's dtype
    if not first_method(config).chooses or own.plan is not None:
        return RESULTS
    patterns = [x for name in names for key, x in config.peft[name].items() if key.endswith("_pattern")]
    # Candidates of other sizes keep their scale.
    scaled = set(own.sizes) != {1} and ("rslora" in names or any(patterns))
    several = len(own.candidates) * len(own.sizes) > 2 and len(raced_rates(config)) > 1
    # After a race of kinds, rates are compared over equally many steps.
    raced = several and config.train.num_epochs * rows / config.train.batch_size > LONG
    # In long runs rates do not race; what races fits the budget, and the integer program is exact.
    return 6 if scaled or raced or (_chooses_rate(config) and _too_long(config)) or own.budget is not None else RESULTS


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
    if first_method(config).make is None:
        return []
    return [{"method": name, "options": options(config, name)} for name in config.method.split("+")]


def options(config: Config, method: str) -> dict[str, Any]:
    """The options of a method that differ from its defaults, so that plans show only what was chosen."""
    standard = {name: default for name, default, _ in _options(method)}
    given = config.peft[method].to_dict()
    return {name: value for name, value in given.items() if value != standard[name]}


def task_of(config: Config) -> Task:
    """The configured task: one of GLUE's, the user's own files, or what a Python file of theirs defines.

    Raises:
      UserError: if there is no such task, or its files are not what the config says.
    """
    data = config.data
    if config.task == CUSTOM:
        labels = None if data.labels is None else split_names(tuple(map(str, data.labels)))
        given = {name: data[name] for name in hub.SPLITS if data[name] is not None}
        files = given if data.hub is None else hub.fetch(data.hub, given)
        if data.hub is not None and "validation" in files:
            standard = default(CUSTOM, config.method).data
            for name in ("validation_fraction", "split_seed"):
                if data[name] != standard[name]:
                    raise UserError(f"config.data.{name} is set, but {data.hub} has a validation split: drop it")
        return custom(
            files["train"], split_names(data.text), data.label or "label", validation=files.get("validation"),
            test=files.get("test"),
            labels=labels, kind=data.kind, validation_fraction=data.validation_fraction,
            split_seed=data.split_seed,
        )  # fmt: skip
    return tasks.read_task(config.task) if config.task.endswith(".py") else tasks.task(config.task)


def split_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names, also those that the command line gives in one piece: --config.data.text=premise,hypothesis."""
    return tuple(names[0].split(",")) if len(names) == 1 else tuple(names)
