"""The folder of trained modules, `model/` in that of a seed: writes it, verifies it and reads it.

    model/jpeft.json            which base model (name, fingerprint, how it is quantised), which modules in which
                                layers, task and labels
    model/modules.safetensors   the folded leaves, the head, and base parameters where they were trained

Names in the safetensors file are tree paths joined by ":", such as "peft:lora_0:encoder/layer_3/attention/query:a".
Both files carry a hash of their contents, and the description that of the weights: what was damaged or edited since is
refused.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.files import Kind, file_hash, read_leaves, read_record, write_leaves, write_record
from jpeft.core.transform import checked, fold
from jpeft.core.tree import flatten
from jpeft.plans.plan import Spec, build
from jpeft.version import __version__

__all__ = ["DESCRIPTION", "WEIGHTS", "read", "save", "verify"]

WEIGHTS, DESCRIPTION = "modules.safetensors", "jpeft.json"
HEADS = (("classifier", "bias"), ("classifier", "out_proj", "bias"))  # the last leaf of a head, by its path
KIND = Kind(
    "description of trained modules",
    {
        "format": int, "jpeft": str, "weights": str, "task": str, "labels": list[str], "max_length": int,
        "num_texts": int, "answers": str | None, "own_encode": bool | None,
        "modules": [{"method": str, "options": dict}],
        "base": {
            "name": str, "fingerprint": str, "config": str, "tokenizer": str,
            "quantise": str | None, "quantise_except": str | None,
        },
    },
)  # fmt: skip
MOST_TOKENS = 2**16  # as `config.train.max_length` has it
FORMAT = 1  # of the folder; raised when what an earlier version writes cannot be read any more


def save(
    folder: Path,
    trainable: Mapping[str, Any],
    modules: Spec,
    *,
    base: str,
    fingerprint: str,
    identity: Mapping[str, str],
    task: str,
    labels: Sequence[str],
    kind: str,
    max_length: int,
    num_texts: int,
    own_encode: bool = False,
    quantise: str | None = None,
    quantise_except: str | None = None,
) -> int:
    """Writes a folder that `jpeft.load` reads.

    Args:
      folder: made if need be.
      trainable: {"params": the head and trained base parameters, "peft": the leaves of `build(modules)`}.
      modules: what to rebuild the transform from.
      base: the base model, a name or folder as given to `jpeft.models.pretrained.load`.
      fingerprint: of the base parameters that did not train.
      identity: of the base model's shape and tokenizer, from `jpeft.models.pretrained.identity`.
      task: the task's name.
      labels: class names; () for regression.
      kind: of answer, a key of `jpeft.data.kinds.KINDS`.
      max_length: tokens that inputs were cut to.
      num_texts: 1 for sentences, 2 for pairs.
      own_encode: whether the task made token ids of texts in a way of its own.
      quantise: what the kernels of the base are quantised as; None if they are not. Codes are never saved: `jpeft.load`
        makes them again.
      quantise_except: pattern of those that are not.

    Returns:
      The size of the weights file in bytes.
    """
    kept = {"params": trainable["params"], "peft": fold(build(modules), trainable["peft"])}
    write_leaves(folder / WEIGHTS, kept)
    description = {
        "format": FORMAT,
        "jpeft": __version__,
        "weights": file_hash(folder / WEIGHTS),
        "base": {
            "name": base,
            "fingerprint": fingerprint,
            **identity,
            "quantise": quantise,
            "quantise_except": quantise_except,
        },
        "task": task,
        "labels": list(labels),
        "answers": kind,
        "max_length": max_length,
        "num_texts": num_texts,
        "own_encode": own_encode,
        "modules": modules,
    }
    write_record(folder / DESCRIPTION, KIND, description)
    return (folder / WEIGHTS).stat().st_size


def verify(folder: Path) -> dict[str, Any]:
    """Checks that a folder is as `save` wrote it, and returns its description.

    Raises:
      UserError: if it is not.
    """
    if not all(os.path.isfile(folder / name) for name in (DESCRIPTION, WEIGHTS)):  # False also for a name too long
        raise UserError(f"{folder} holds no trained modules: expected {DESCRIPTION} and {WEIGHTS}")
    description = read_record(folder / DESCRIPTION, KIND)
    if description.get("format") != FORMAT:
        raise UserError(
            f"{folder} was written by jpeft {description.get('jpeft')}, in a format unknown to {__version__}"
        )
    _check(folder / DESCRIPTION, description)
    if file_hash(folder / WEIGHTS) != description["weights"]:
        raise UserError(f"{folder / WEIGHTS} was changed or damaged, or belongs to another {DESCRIPTION}")
    return description


def _check(path: Path, description: Mapping[str, Any]) -> None:
    """Raises a UserError if an entry is of the right type, but no trained model can have it."""
    labels, most = description["labels"], MOST_TOKENS
    wrong = {
        "labels": len(set(labels)) < len(labels) and "a name occurs twice",
        "max_length": not 1 <= description["max_length"] <= most and f"expected a number from 1 to {most:,}",
        "num_texts": description["num_texts"] not in (1, 2) and "expected 1 for sentences or 2 for pairs",
    }
    for name, told in wrong.items():
        if told:
            raise UserError(f"{path} is not a {KIND.name}: its {name} is {description[name]!r:.60}, {told}")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description of a folder, and its arrays: {"params": the head and what else trained, "peft": folded leaves}.

    Raises:
      UserError: if the folder is not as `save` wrote it, its description is of other weights, or it holds numbers that
        are not finite.
    """
    description = verify(folder)
    kept = read_leaves(folder / WEIGHTS)
    bad = next((path for path, x in flatten(kept).items() if not np.isfinite(np.asarray(x)).all()), None)
    if bad is not None:
        raise UserError(f"{folder / WEIGHTS}: {':'.join(bad)} is not finite")
    checked(build(description["modules"]), kept.get("peft", {}))
    params, outputs = flatten(kept["params"]) if "params" in kept else {}, len(description["labels"]) or 1
    bias = next((params[path] for path in HEADS if path in params), np.zeros(0))
    if bias.shape != (outputs,):
        raise UserError(f"{folder / DESCRIPTION} has labels for {outputs} outputs, but the head has {bias.size}")
    return description, kept
