"""A whole run, top to bottom: data, model, choose, train, evaluate, export, report."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jpeft import config as configs
from jpeft import files, optim, plan, saved, transform, tree
from jpeft.data import batching, tasks
from jpeft.errors import UserError
from jpeft.fisher import fisher
from jpeft.models import Bert, pretrained
from jpeft.plan import Entry, Plan, Spec
from jpeft.report import plots, tables
from jpeft.report.console import Console
from jpeft.selection import SELECTIONS, fishpal
from jpeft.training import step
from jpeft.training.loop import Schedule, compile_steps, fit
from jpeft.version import __version__

__all__ = ["Data", "Result", "run"]

PICTURE = "fisher.png"


class Data(NamedTuple):
    """The tokenised task.

    Attributes:
      task: what it is.
      train: training examples, after `max_train_examples`.
      dev: examples to evaluate on.
      buckets: the padded lengths, in tokens.
    """

    task: tasks.Task
    train: batching.Examples
    dev: batching.Examples
    buckets: tuple[int, ...]


class Result(NamedTuple):
    """What one seed gives, JSON throughout; kept in `seed_<n>/result.json`."""

    history: list[dict[str, Any]]
    parameters: dict[str, Any]
    seconds: dict[str, float]
    examples_seen: int
    peak_memory_bytes: int


def run(config: ConfigDict, workdir: Path, console: Console | None = None) -> dict[str, Any]:
    """Runs an experiment, or what is left of it, and returns its report.

    Args:
      config: see `jpeft.config.default`.
      workdir: made if need be; a workdir with an unfinished run of the same config is resumed.
      console: where to print; None means standard output.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: for anything that the user can mend.
    """
    console = console or Console()
    configs.check(config)
    _claim(workdir, config)
    use_compilation_cache()
    console.title(f"{config.method} on {config.task} with {config.model}, in {workdir}")
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        splits = load_splits(config, console)
        folder = pretrained.resolve(config.model)
    results = {seed: _run_seed(config, seed, splits, workdir, seconds, console) for seed in config.seeds}
    return _report(config, results, seconds, workdir, console)


def use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of the user, unless JAX_COMPILATION_CACHE_DIR says where or "" says no."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jpeft" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
