"""Trained modules on disk: what a run leaves in `model/`, and what `jpeft.load` makes of it.

    model/jpeft.json            which base model (name and fingerprint), which modules in which layers, task and labels
    model/modules.safetensors   the folded leaves, the head, and base parameters where they were trained

Names in the safetensors file are tree paths joined by ":", such as "peft:lora_0:encoder/layer_3/attention/query:a".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jpeft.core.errors import UserError
from jpeft.core.files import read_json, read_leaves, write_json, write_leaves
from jpeft.core.transform import Chain, fold
from jpeft.core.tree import flatten, split, union
from jpeft.models.bert import Bert
from jpeft.plans.plan import Spec, build
from jpeft.version import __version__

__all__ = ["Saved", "load", "save"]

WEIGHTS, DESCRIPTION = "modules.safetensors", "jpeft.json"


class Saved(NamedTuple):
    """A model with its trained modules, ready for `jpeft.apply`.

    Attributes:
      model: the encoder.
      transform: the transform that `variables["peft"]` are the leaves of.
      variables: {"params": base and head, "peft": folded leaves}.
      labels: class names in the order of the logits; () for regression.
      task: the task it was trained on.
      max_length: tokens that an input was cut to in training.
      tokenizer: folder of the base model's tokenizer.
      num_texts: 1 if it was trained on sentences, 2 if on pairs; None in folders of earlier versions.
    """

    model: Bert
    transform: Chain
    variables: dict[str, Any]
    labels: tuple[str, ...]
    task: str
    max_length: int
    tokenizer: Path
    num_texts: int | None = None


def save(
    folder: Path,
    trainable: Mapping[str, Any],
    modules: Spec,
    *,
    base: str,
    fingerprint: str,
    task: str,
    labels: Sequence[str],
    max_length: int,
    num_texts: int,
) -> int:
    """Writes a folder that `load` reads.

    Args:
      folder: made if need be.
      trainable: {"params": the head and trained base parameters, "peft": the leaves of `build(modules)`}.
      modules: what to rebuild the transform from.
      base: the base model, a name or folder as given to `jpeft.models.pretrained.load`.
      fingerprint: of the base parameters that did not train.
      task: the task's name.
      labels: class names; () for regression.
      max_length: tokens that inputs were cut to.
      num_texts: 1 for sentences, 2 for pairs.

    Returns:
      The size of the weights file in bytes.
    """
    kept = {"params": trainable["params"], "peft": fold(build(modules), trainable["peft"])}
    write_leaves(folder / WEIGHTS, kept)
    description = {
        "jpeft": __version__,
        "base": {"name": base, "fingerprint": fingerprint},
        "task": task,
        "labels": list(labels),
        "max_length": max_length,
        "num_texts": num_texts,
        "modules": modules,
    }
    write_json(folder / DESCRIPTION, description)
    return (folder / WEIGHTS).stat().st_size


def load(folder: str | Path, base: str | None = None) -> Saved:
    """Restores what a run saved in its `model/` folder.

    Args:
      folder: a `seed_<n>/model` folder of a workdir.
      base: where the base model is now, if not where it was in training.

    Returns:
      The model, its transform and its variables.

    Raises:
      UserError: if the folder is not one of ours or the base model is another one.
    """
    from jpeft.models import pretrained

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no trained modules: expected {DESCRIPTION} and {WEIGHTS}")
    description = read_json(folder / DESCRIPTION)
    labels = tuple(description["labels"])
    name = base or description["base"]["name"]
    loaded = pretrained.load(name, num_labels=len(labels) or 1, key=jax.random.key(0))
    kept = read_leaves(folder / WEIGHTS)
    trained = flatten(kept["params"])
    _, frozen = split(loaded.params, lambda path: path in trained)
    if pretrained.fingerprint(frozen) != description["base"]["fingerprint"]:
        raise UserError(f"{folder} was trained on other base weights than those of {name}: name them with `base`")
    variables = {"params": union(loaded.params, kept["params"]), "peft": kept.get("peft", {})}
    return Saved(
        Bert(loaded.config),
        build(description["modules"]),
        variables,
        labels,
        description["task"],
        description["max_length"],
        loaded.folder,
        description.get("num_texts"),
    )
