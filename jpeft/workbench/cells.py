"""The file of a finished cell of a grid: its scores and predictions, and what they were made from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data import kinds
from jpeft.plans import plan as plans
from jpeft.run import config as configs
from jpeft.run import experiment
from jpeft.run import workdir as workdirs
from jpeft.run.config import Config

__all__ = ["KIND", "Cell", "read", "unpacked", "write"]

KIND = "finished cell"


class Cell(NamedTuple):
    """One run of a grid; `learning_rate` is None for the method's own."""

    task: str
    variant: str
    learning_rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Of its file and folder: "mrpc-lora-11", "mrpc-lora-0.001-11"."""
        rate = [] if self.learning_rate is None else [f"{self.learning_rate:g}"]
        return re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join([self.task, self.variant, *rate, str(self.seed)]))


def write(folder: Path, config: Config, cell: Cell, report: Mapping[str, Any], workdir: Path) -> None:
    """Writes the file of a finished cell.

    Args:
      folder: of the cells' files.
      config: of the cell's run.
      cell: which.
      report: of its run.
      workdir: of its run.
    """
    arrays = files.read_leaves(workdir / f"seed_{cell.seed}" / experiment.PREDICTIONS)
    logits, labels = (np.asarray(arrays[name]) for name in ("logits", "labels"))
    choice, task = report.get("choice"), configs.task_of(config)
    answers = task.answers
    predictions = answers.decide(logits)
    if answers.by_token:  # where the labels of the words are
        predictions, words = np.full_like(labels, kinds.IGNORED), predictions
        predictions[labels != kinds.IGNORED] = words
    inputs = files.read_record(workdir / workdirs.INPUTS, workdirs.INPUTS_KIND)
    del inputs["source"]  # where the data lie is the machine's
    del inputs["others"]  # splits of which a cell has no scores
    row = {
        **cell._asdict(),
        "config": _config(config),
        "primary_metric": report["primary_metric"],
        "metrics": report["metrics"]["mean"],
        "trainable_percent": report["parameters"]["trainable_percent"],
        "added_percent": report["parameters"]["added_percent"],
        "module_bytes": report["parameters"]["module_bytes"],
        "seconds": {name: round(value, 1) for name, value in report["seconds"].items()},
        **({"choice": choice} if choice else {}),
        "versions": report["versions"],
        "inputs": inputs,
        # A score of the user's own may ask for more than the decisions.
        **({"logits": [_packed(row) for row in logits.reshape(len(logits), -1)]} if task.own_score else {}),
        "predictions": _packed(predictions),
        "labels": _packed(labels),
    }
    files.write_record(folder / f"{cell.name}.json", KIND, row)


def _config(config: Config) -> dict[str, Any]:
    """The fields that are not the defaults; where data and models lie is left out, since it is the machine's.

    A plan that is given by its file is that file's plan, which may become another one.
    """
    found = {name: value for name, value in configs.chosen(config).items() if name != "data.path"}
    given = config.fishpal.plan
    if given is not None and given not in plans.PLANS and not given.lstrip().startswith("{"):
        found["fishpal.plan"] = plans.dumps(plans.read(given))
    return json.loads(json.dumps({"method": config.method, **found}))


def _packed(values: np.ndarray) -> str | list[Any]:
    """Class ids as one string of digits, where there are at most ten; values with six digits; lists of several."""
    if values.ndim > 1:
        return values.astype(int).tolist()
    if not np.issubdtype(values.dtype, np.integer):
        return [float(f"{x:.6g}") for x in values.tolist()]
    return "".join(map(str, values)) if values.max(initial=0) < 10 else values.tolist()


def unpacked(values: str | list[Any]) -> np.ndarray:
    """Predictions or labels as a cell's file has them, [n, ...]."""
    return np.array([int(x) for x in values]) if isinstance(values, str) else np.array(values)


def read(folder: Path, config: Config, cell: Cell) -> dict[str, Any] | None:
    """The contents of a cell's file; None if it has none yet.

    Args:
      folder: of the cells' files.
      config: of the cell's run.
      cell: which.

    Raises:
      UserError: if the file is not one, was changed, or is of another config.
    """
    path = folder / f"{cell.name}.json"
    if not path.is_file():
        return None
    row = files.read_record(path, KIND)
    old, new = row["config"], _config(config)
    differ = [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]
    if differ:
        told = "; ".join(f"{name} was {_told(old, name)}, now {_told(new, name)}" for name in differ)
        raise UserError(f"{path} is of another config ({told}): choose another folder for --cells")
    return row


def _told(config: Mapping[str, Any], name: str) -> str:
    return repr(config[name]) if name in config else "not set"
