"""The space that a search looks through: a size for each candidate module, 0 for none, and which layers have them.

This is the space of AutoPEFT (Zhou et al. 2023, arXiv:2301.12132): modules side by side in one layer, each of one size
in all layers that have any, and one bit for each layer. A point is {name: index}, so that a sampler needs to know
nothing of modules: of a candidate, the index of its size; of "layer_3", 1 if the layer has the modules.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jpeft.core.errors import UserError, nearest
from jpeft.plans import plan as plans
from jpeft.plans.plan import Entry, Plan
from jpeft.run.config import Config
from jpeft.transforms.registry import METHODS, defaults

__all__ = ["LAYERS", "Point", "autopeft", "check", "choices", "key", "largest", "middles", "plan_of", "size"]

Point = Mapping[str, int]
LAYERS = ("bits", "all")  # a bit for each layer, or the modules in all of them
FIELDS = ("method", "option", "sizes", "options")
SIZES = (0, 1, 3, 6, 12, 24, 48, 96, 192)  # each about twice the one before, so that an index is a logarithm


def autopeft() -> dict[str, dict[str, Any]]:
    """AutoPEFT's candidates: a serial and a parallel adapter, and a prefix, whose MLP would be most of what trains."""
    return {
        "serial": {"method": "pfeiffer", "option": "bottleneck", "sizes": SIZES, "options": {}},
        "parallel": {"method": "parallel", "option": "bottleneck", "sizes": SIZES, "options": {}},
        "prefix": {
            "method": "prefix",
            "option": "num_virtual_tokens",
            "sizes": SIZES,
            "options": {"mlp_hidden": None},
        },
    }


def check(space: Config) -> None:
    """Checks that every size of every candidate is a module.

    Raises:
      UserError: for the first one that is not.
    """
    if not isinstance(space, ConfigDict) or not space:
        raise UserError("config.space must be {name: candidate}, with at least one candidate")
    for name in space:
        _check_candidate(name, space[name])


def _check_candidate(name: str, candidate: Any) -> None:
    where = f"config.space.{name}"
    if not name.isprintable() or name.startswith("layer_"):
        raise UserError(f"config.space: {name!r:.60} cannot be the name of a candidate: choose another")
    if not isinstance(candidate, ConfigDict):
        raise UserError(f"{where} must be a dict of {', '.join(FIELDS)}, got {candidate!r:.60}")
    if unknown := [field for field in candidate if field not in FIELDS]:
        raise UserError(f"{where} has no field {unknown[0]!r}: {nearest(unknown[0], FIELDS)}")
    if missing := [field for field in FIELDS[:3] if field not in candidate]:
        raise UserError(f"{where} lacks {missing[0]!r}: expected {', '.join(FIELDS)}")
    for field in FIELDS[:2]:
        if not isinstance(candidate[field], str):
            raise UserError(f"{where}.{field} must be a name, got {candidate[field]!r:.60}")
    sizes: Any = candidate.sizes
    whole = isinstance(sizes, tuple | list) and all(type(x) is int and x >= 0 for x in sizes)
    if not whole or not any(sizes) or list(sizes) != sorted(set(sizes)):
        raise UserError(f"{where}.sizes must be whole numbers in rising order, 0 for none, got {sizes!r:.60}")
    if not isinstance(candidate.get("options", ConfigDict()), ConfigDict):
        raise UserError(f"{where}.options must be a dict, got {candidate.options!r:.60}")
    for number in filter(None, sizes):
        entry = _entry(candidate, number)
        if "layers" in entry.options:
            raise UserError(f"{where}: the search sets the layers, so drop the option 'layers'")
        try:
            plans.make(entry.method, **entry.options)
            plans.layered(entry.method)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _entry(candidate: Config, number: int) -> Entry:
    """The module of a size. LoRA's alpha grows with the rank, as in `plans.resized`, unless `options` say it."""
    options = candidate.get("options", ConfigDict()).to_dict()
    known = defaults(candidate.method) if candidate.method in METHODS else {}
    if candidate.option == "rank" and "alpha" in known and "alpha" not in options:
        by = number / known["rank"]
        options["alpha"] = known["alpha"] * (math.sqrt(by) if candidate.method == "rslora" else by)
    return Entry(candidate.method, {candidate.option: number, **options})


def choices(space: Config, layers: str, num_layers: int) -> dict[str, int]:
    """How many choices each name of a point has."""
    bits = {f"layer_{i}": 2 for i in range(num_layers)} if layers == "bits" else {}
    return {**{name: len(space[name].sizes) for name in space}, **bits}


def size(space: Config, layers: str, num_layers: int) -> int:
    """How many plans there are, without those that have no module."""
    sizes = math.prod(len(space[name].sizes) for name in space) - all(0 in space[name].sizes for name in space)
    return sizes * (2**num_layers - 1 if layers == "bits" else 1)


def middles(space: Config, layers: str, num_layers: int) -> list[Point]:
    """The uniform plans: each candidate alone, at the middle of its sizes, in all layers.

    A candidate is left out if another one is always there.
    """
    bits = {name: 1 for name in choices(space, layers, num_layers) if name not in space}
    found = []
    for name in space:
        others = [other for other in space if other != name]
        if not all(0 in space[other].sizes for other in others):
            continue
        present = [i for i, number in enumerate(space[name].sizes) if number]
        found.append({**dict.fromkeys(others, 0), name: present[len(present) // 2], **bits})
    return found


def largest(space: Config) -> Plan:
    """Every candidate at its largest size, in the first layer."""
    return {0: [_entry(space[name], space[name].sizes[-1]) for name in space]}


def plan_of(space: Config, num_layers: int, point: Point) -> Plan:
    """The plan of a point; {} if it has no module."""
    chosen = [(space[name], space[name].sizes[point[name]]) for name in space]
    entries = [_entry(candidate, number) for candidate, number in chosen if number]
    on = [layer for layer in range(num_layers) if point.get(f"layer_{layer}", 1)]
    return {layer: list(entries) for layer in on} if entries else {}


def key(plan: Plan) -> str:
    """A name for a plan, the same for the same plan."""
    return hashlib.sha256(plans.dumps(plan).encode()).hexdigest()[:12]
