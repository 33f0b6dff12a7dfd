"""One seed of a run: what it starts from."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
from jax import Array

from jpeft.core import site
from jpeft.core.errors import UserError
from jpeft.core.site import Sites
from jpeft.data.task import Data, Task
from jpeft.models import Bert, BertConfig, pretrained
from jpeft.models.coded import coded
from jpeft.models.pretrained import Pretrained
from jpeft.plans import plan as plans
from jpeft.run import config as configs
from jpeft.run.clock import Clock
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.training import draws

__all__ = ["Seed", "begin", "load_model"]


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
        """The parts of the base that train whatever the method is: the head, and what is new."""
        return tuple(name for name in self.base.params if name in (*self.model.HEAD, *self.base.fresh))

    @property
    def folder(self) -> Path:
        """Where everything that belongs to this seed is kept."""
        return self.workdir / f"seed_{self.seed}"


def begin(config: Config, seed: int, data: Data, base: Pretrained, workdir: Path, console: Console) -> Seed:
    """Gives the model, as it was loaded for any seed, the head of this one."""
    base = pretrained.redrawn(base, jax.random.key(seed))
    model = Bert(base.config)
    # What is new trains anyway, and as a whole: it is not a place for a method.
    found = _sites(base.config, data.longest).items()
    sites = {path: site for path, site in found if site.head or path.split("/")[0] not in base.fresh}
    key, rest = jax.random.split(jax.random.key(seed))
    dropout_key = draws.dropout_key(rest)
    clock = Clock(dict.fromkeys(("fisher", "compile", "train", "evaluate"), 0.0))
    return Seed(config, seed, data, base, model, sites, key, dropout_key, workdir, console, clock)


@functools.lru_cache(maxsize=4)  # it traces the whole model, which all seeds share
def _sites(config: BertConfig, length: int) -> site.Sites:
    return site.sites(Bert(config), jax.ShapeDtypeStruct((1, length), "int32"))


def load_model(config: Config, task: Task, seed: int) -> Pretrained:
    """The pretrained encoder with a head for a task; the seed decides what the checkpoint lacks of it.

    Raises:
      UserError: if it cannot be loaded, or does not fit the config.
    """
    base = pretrained.load(
        config.model,
        num_labels=task.num_labels,
        key=jax.random.key(seed),
        dtype=configs.dtype(config),
        remat=config.train.remat,
        by_token=task.answers.by_token,
    )
    if config.train.max_length > base.config.max_length:
        longest = base.config.max_length
        raise UserError(f"config.train.max_length {config.train.max_length}: {config.model} takes at most {longest}")
    if config.fishpal.plan is not None:
        plans.check(plans.read(config.fishpal.plan), base.config.num_hidden_layers)
    try:
        params = coded(base.config, base.params, config.quantise, config.quantise_except)
    except UserError as error:
        field = "quantise" if config.quantise_except is None else "quantise_except"
        raise UserError(f"config.{field}: {error}") from None
    return base._replace(params=params)
