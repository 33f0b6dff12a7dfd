"""Trained modules ready for use: what `jpeft.load` makes of the folder that a run leaves."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jpeft.core.errors import UserError
from jpeft.core.transform import Chain
from jpeft.core.tree import union
from jpeft.data import tokenizer as tokenizers
from jpeft.data.kinds import KINDS
from jpeft.models.bert import Bert
from jpeft.models.coded import coded
from jpeft.models.conversion import fingerprint
from jpeft.plans.plan import build
from jpeft.store import bases
from jpeft.store.model_folder import read
from jpeft.version import __version__

__all__ = ["Saved", "load"]


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
      own_encode: whether the task made token ids of texts in a way of its own, which `jpeft.predict` does not know.
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
    own_encode: bool = False


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
        bool(description.get("own_encode")),
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
        own_encode=bool(description.get("own_encode")),
    )
