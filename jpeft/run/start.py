"""Starts a run from the modules of another: those of MNLI for RTE, under a new head."""

import json
from pathlib import Path
from typing import Any

import jax

from jpeft.core.errors import UserError
from jpeft.core.transform import Leaves
from jpeft.core.tree import union
from jpeft.models.pretrained import fingerprint, identity
from jpeft.plans.plan import Spec
from jpeft.run import config as configs
from jpeft.run.seed import Seed
from jpeft.store import bases, model_folder

__all__ = ["start"]


def start(seed: Seed, modules: Spec, leaves: Leaves) -> tuple[dict[str, Any], Leaves]:
    """The parameters and leaves that training starts from.

    Args:
      seed: its config says from where, in `init_from`; None leaves everything as it is.
      modules: what this run trains.
      leaves: as they are initialised.

    Raises:
      UserError: if the folder holds other modules, modules of another base model, or modules whose saved form cannot be
        trained on, such as prefixes, which are saved without the network that made them.
    """
    params, given = seed.base.params, seed.config.init_from
    if given is None:
        return params, leaves
    description, kept = model_folder.read(Path(given))
    theirs, ours = description["modules"], json.loads(json.dumps(modules))
    if theirs != ours:
        raise UserError(f"config.init_from {given} holds {_told(theirs)}, but this run trains {_told(ours)}")
    (kind, exceptions), config = bases.codes(description), seed.config
    if (kind, exceptions) != (config.quantise, config.quantise_except):
        raise UserError(
            f"config.init_from {given} was trained on {bases.told(kind)}, and this run has "
            f"{bases.told(config.quantise)}: set config.quantise to {kind!r}, config.quantise_except to {exceptions!r}"
        )
    if fingerprint(bases.frozen(params, kept, *seed.model.HEAD)) != description["base"]["fingerprint"]:
        raise UserError(
            f"config.init_from {given} was trained on other base weights than those of {seed.config.model}, or for "
            "another kind of answer, whose model has other parts"
        )
    for what, now in identity(seed.base).items():
        if now != description["base"][what]:
            raise UserError(
                f"config.init_from {given} was trained with another {what} than that of {seed.config.model}"
            )
    found = kept.get("peft", {})
    if jax.tree.map(lambda x: x.shape, found) != jax.tree.map(lambda x: x.shape, leaves):
        raise UserError(
            f"config.init_from {given}: {_told(ours)} is saved folded, and what was folded cannot be trained on; "
            "for prefixes, set mlp_hidden to None in both runs"
        )
    body = {name: x for name, x in kept["params"].items() if name not in seed.model.HEAD}
    if not configs.first_method(config).trains_base and (lost := sorted(set(body) - set(seed.head))):
        raise UserError(
            f"config.init_from {given} trained {', '.join(lost)} of the base model, which {config.method!r} neither "
            "trains nor saves: expected config.method 'full'"
        )
    seed.console.say(f"  starting from {given}, trained on {description['task']}, with a new head")
    return union(params, body), found


def _told(modules: Spec) -> str:
    entries = (f"{entry['method']} {json.dumps(entry['options'])}" for entry in modules)
    return "; ".join(entries) or "no modules"
