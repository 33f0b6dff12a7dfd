"""Trained modules on disk: what a run leaves in `model/`, and what `jpeft.load` makes of it.

    model/jpeft.json            which base model (name, fingerprint, how it is quantised), which modules in which
                                layers, task and labels
    model/modules.safetensors   the folded leaves, the head, and base parameters where they were trained

Names in the safetensors file are tree paths joined by ":", such as "peft:lora_0:encoder/layer_3/attention/query:a".
Both files carry a hash of their contents, and the description that of the weights: what was damaged or edited since is
refused.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.files import Kind, file_hash, read_leaves, read_record, write_leaves, write_record
from jpeft.core.transform import Chain, checked, fold
from jpeft.core.tree import flatten, union
from jpeft.data import tokenizer as tokenizers
from jpeft.data.kinds import KINDS
from jpeft.models.bert import Bert
from jpeft.models.coded import coded
from jpeft.models.conversion import fingerprint
from jpeft.plans.plan import Spec, build
from jpeft.store import bases
from jpeft.version import __version__

__all__ = ["Saved", "load", "read", "save", "verify"]

WEIGHTS, DESCRIPTION = "modules.safetensors", "jpeft.json"
HEADS = (("classifier", "bias"), ("classifier", "out_proj", "bias"))  # the last leaf of a head, by its path
KIND = Kind(
    "description of trained modules",
    {
        "format": int, "jpeft": str, "weights": str, "task": str, "labels": list[str], "max_length": int,
        "num_texts": int, "answers": str | None, "modules": [{"method": str, "options": dict}],
        "base": {
            "name": str, "fingerprint": str, "config": str, "tokenizer": str,
            "quantise": str | None, "quantise_except": str | None,
        },
    },
)  # fmt: skip
MOST_TOKENS = 2**16  # as `config.train.max_length` has it
FORMAT = 1  # of the folder; raised when what an earlier version writes cannot be read any more


class Saved(NamedTuple):
    """A model with its trained modules, ready for `jpeft.apply`.

    Attributes:
      model: the encoder.
      transform: the transform that `variables["peft"]` are the leaves of.
      variables: {"params": base and head, "peft": folded leaves}.
      labels: class names in the order of the logits; () for regression.
      task: the task it was trained on.
      max_length: tokens that an input was cut to in training.
      tokenizer: of the base model, from `transformers`.
      num_texts: 1 if it was trained on sentences, 2 if on pairs.
      base: folder of the base model.
      identity: of the base model: hashes of what did not train, of its shape and of its tokenizer, and how it is
        quantised, if it is.
      kind: of answer, a key of `jpeft.data.kinds.KINDS`.
    """

    model: Bert
    transform: Chain
    variables: dict[str, Any]
    labels: tuple[str, ...]
    task: str
    max_length: int
    tokenizer: Any
    num_texts: int
    base: Path
    identity: Mapping[str, str]
    kind: str = "classification"


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
    quantise: str | None = None,
    quantise_except: str | None = None,
) -> int:
    """Writes a folder that `load` reads.

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
      quantise: what the kernels of the base are quantised as; None if they are not. Codes are never saved: `load` makes
        them again.
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


def load(folder: str | Path, base: str | Saved | None = None, quantised: bool = True) -> Saved:
    """Restores what a run saved in its `model/` folder.

    Args:
      folder: a `seed_<n>/model` folder of a workdir.
      base: where the base model is now, if not where it was in training; or another loaded model, whose arrays of the
        base are shared in the place of reading them again, which takes milliseconds.
      quantised: whether modules that were trained on a quantised base get that base. False gives them the same base as
        it was before, in float32: it is compared all the same, and the answers differ a little from those in training.

    Returns:
      The model, its transform and its variables.

    Raises:
      UserError: if the folder is not one of ours, was changed since it was written, holds weights that are not finite,
        or the base model is another one.
    """
    from jpeft.models import pretrained

    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"expected the name of a folder, got {folder!r:.60}")
    folder = Path(folder)
    description, kept = read(folder)
    labels, kind = tuple(description["labels"]), _kind(description)
    if isinstance(base, Saved):
        return _beside(base, folder, description, kept, quantised)
    name, by_token = base or description["base"]["name"], KINDS[kind].by_token
    loaded = pretrained.load(name, num_labels=len(labels) or 1, key=jax.random.key(0), by_token=by_token)
    identity = bases.identity(description)
    params = coded(loaded.config, loaded.params, *bases.codes(description))
    if fingerprint(bases.frozen(params, kept)) != identity["fingerprint"]:
        raise UserError(
            f"{folder} was trained on other base weights than those of {name}: restore them, or give jpeft.load their "
            "place as `base`"
        )
    for what, found in pretrained.identity(loaded).items():
        if found != identity[what]:
            raise UserError(f"the {what} of {name} is not the one that {folder} was trained with: restore it")
    if not quantised:
        params = loaded.params
        identity = bases.unquantised(identity, fingerprint(bases.frozen(params, kept)))
    return Saved(
        Bert(loaded.config),
        build(description["modules"]),
        {"params": union(params, kept["params"]), "peft": kept.get("peft", {})},
        labels,
        description["task"],
        description["max_length"],
        tokenizers.load(loaded.folder, loaded.config.vocab_size, words=by_token),
        description["num_texts"],
        loaded.folder,
        identity,
        kind,
    )


def _kind(description: Mapping[str, Any]) -> str:
    kind = description.get("answers") or ("classification" if description["labels"] else "regression")
    if kind not in KINDS:
        raise UserError(f"the answers {kind!r} are unknown to jpeft {__version__}")
    return kind


def _beside(
    other: Saved, folder: Path, description: Mapping[str, Any], kept: Mapping[str, Any], quantised: bool
) -> Saved:
    """The modules of a folder on the base of a loaded model, which was verified when that was loaded."""
    frozen, wanted = bases.frozen(other.variables["params"], kept, *Bert.HEAD), bases.identity(description)
    theirs, ours = wanted.get("quantise"), other.identity.get("quantise")
    if theirs is not None and ours is None and not quantised:
        as_trained = coded(other.model.config, frozen, *bases.codes(description))
        if fingerprint(as_trained) == wanted["fingerprint"]:
            wanted = bases.unquantised(wanted, fingerprint(frozen))
    elif theirs != ours:
        raise UserError(
            f"{folder} was trained on {bases.told(theirs)}, and the loaded model has {bases.told(ours)}: "
            f"{'load it with quantised=False' if ours is None else 'load it by itself'}"
        )
    if other.identity != wanted:
        raise UserError(
            f"{folder} was trained on another base than the loaded model, with other parts of it frozen, or for "
            "another kind of answer"
        )
    labels = tuple(description["labels"])
    kind = _kind(description)
    by_token, config = KINDS[kind].by_token, other.model.config
    tokenizer = other.tokenizer
    if by_token != config.by_token:
        tokenizer = tokenizers.load(other.base, config.vocab_size, words=by_token)
    return other._replace(
        model=Bert(dataclasses.replace(config, num_labels=len(labels) or 1, by_token=by_token)),
        transform=build(description["modules"]),
        variables={"params": union(frozen, kept["params"]), "peft": kept.get("peft", {})},
        labels=labels,
        kind=kind,
        tokenizer=tokenizer,
        task=description["task"],
        max_length=description["max_length"],
        num_texts=description["num_texts"],
    )
