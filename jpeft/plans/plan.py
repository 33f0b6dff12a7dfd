"""Plans: which modules each layer gets, as data.

    {0: [Entry("prefix", {})], 1: [Entry("pfeiffer", {"bottleneck": 48})], 2: [Entry("lora", {"rank": 8})]}

FishPAL returns a plan; one can also be written by hand. `build` turns it into a transform. Modules that a layer does
not list are not in the graph.
"""

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.core.schema import in_words, is_a
from jpeft.core.transform import Chain, Transform, chain, members
from jpeft.transforms.registry import METHODS, MODULES, RENAMED, defaults

__all__ = [
    "PLANS",
    "Entry",
    "Plan",
    "Spec",
    "build",
    "check",
    "dumps",
    "layered",
    "loads",
    "make",
    "read",
    "resized",
    "spec",
    "uniform",
]


class Entry(NamedTuple):
    """One module: its name in `jpeft.METHODS` and its options, except `layers`."""

    method: str
    options: Mapping[str, Any] = {}


Plan = dict[int, list[Entry]]
Spec = list[dict[str, Any]]  # [{"method": ..., "options": {..., "layers": [...]}}]; saved models are rebuilt from it


def make(method: str, **options: Any) -> Transform | Chain:
    """The transform of a method, by name.

    Raises:
      UserError: if the method or an option is unknown, or an option's value is of another type than in the signature of
        the method, not finite, or out of range.
    """
    method = _current(method)
    factory = METHODS[method].make if method in METHODS else None
    if factory is None:
        wrong = "is not a module" if method in METHODS else "is unknown"
        raise UserError(f"method {method!r} {wrong}: {nearest(method, MODULES)}")
    known = get_type_hints(factory)
    known.pop("return", None)
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{method} has no option {name!r}: {nearest(name, known)}")
        kinds = get_args(known[name]) if isinstance(known[name], UnionType) else (known[name],)
        if not any(is_a(value, kind) for kind in kinds):
            wanted = " or ".join(map(in_words, kinds))
            raise UserError(f"{name} must be {wanted}, got {value!r:.60}")
    layers = options.get("layers") or ()
    if len(set(layers)) < len(layers):
        raise UserError(f"layers names a layer twice: {layers!r:.60}")
    return factory(**options)


def layered(method: str) -> None:
    """Checks that a method can be put into single layers, as plans do.

    Raises:
      UserError: if it acts on the whole model.
    """
    known = _layered()
    if _current(method) in MODULES and _current(method) not in known:
        raise UserError(f"{method} acts on the whole model and cannot be put into a layer: {nearest(method, known)}")


@functools.cache
def _layered() -> list[str]:
    return [name for name in MODULES if "layers" in defaults(name)]


def _current(name: str) -> str:
    """The current name of a method, for a name that an earlier version wrote."""
    return RENAMED.get(name, name)


SIZES = ("rank", "bottleneck", "num_virtual_tokens", "reduction_factor")  # the options that say how large a module is


def resized(entry: Entry, by: float) -> Entry:
    """The module at `by` times its size: LoRA's rank, an adapter's bottleneck, a prefix's tokens.

    LoRA's alpha grows with the rank, and rsLoRA's with its square root, so that the scale stays the same. Ranks and
    alphas of patterns do as the others.

    Raises:
      UserError: if the module has no size, or one would be below 1 or no integer.
    """
    now = {**defaults(entry.method), **entry.options}
    changed: dict[str, Any] = {}
    for name in SIZES:
        if now.get(name) is None or (name == "reduction_factor" and now.get("bottleneck") is not None):
            continue
        changed[name] = now[name] / by if name == "reduction_factor" else _times(entry.method, name, now[name], by)
    if not changed:
        raise UserError(f"{entry.method} comes in one size only: drop it from the candidates, or the other sizes")
    if "rank" in changed and "alpha" in now:
        more = math.sqrt(by) if entry.method == "rslora" else by
        changed["alpha"] = now["alpha"] * more
        if now.get("alpha_pattern"):
            changed["alpha_pattern"] = {pattern: alpha * more for pattern, alpha in now["alpha_pattern"].items()}
    if now.get("rank_pattern"):
        ranks = now["rank_pattern"].items()
        changed["rank_pattern"] = {pattern: _times(entry.method, "rank", rank, by) for pattern, rank in ranks}
    return Entry(entry.method, {**entry.options, **changed})


def _times(method: str, name: str, size: int, by: float) -> int:
    more = round(size * by)
    if more < 1 or more != size * by:
        raise UserError(f"{method} has {name} {size}, which cannot be made {by:g} times as large")
    return more


def uniform(entry: Entry, num_layers: int) -> Plan:
    """The same module in every layer."""
    return {layer: [entry] for layer in range(num_layers)}


def spec(plan: Plan) -> Spec:
    """Groups the layers that have the same module, so that its shared leaves are shared among them.

    The order within a layer is preserved: layers [a, b] and [b, a] give three groups, a, b, a.
    """
    groups: list[tuple[Entry, list[int]]] = []
    for layer in sorted(plan):
        at = 0
        for entry in plan[layer]:
            same = (i for i in range(at, len(groups)) if groups[i][0] == entry)
            i = next(same, None)
            if i is None:
                i = at
                groups.insert(i, (entry, []))
            groups[i][1].append(layer)
            at = i + 1
    return [{"method": e.method, "options": {**e.options, "layers": layers}} for e, layers in groups]


def build(modules: Plan | Spec, rates: Mapping[str, float] | None = None) -> Chain:
    """The transform of a plan, or of its `spec`.

    Args:
      modules: the plan. An empty spec, [], is the plain model.
      rates: {method: factor}, which multiplies the learning rates of the method's leaves, so that modules of different
        kinds can each train at their own rate. 1 for any other method.

    Returns:
      The chain of the groups' transforms, in the order of `spec`.

    Raises:
      UserError: if a layer is not a number from 0 on, an entry is not a `jpeft.Entry`, a rate is not positive, no layer
        has a module, or an option does not fit its method.
    """
    if isinstance(modules, dict):
        for layer, entries in modules.items():
            _check_layer(layer, entries)
        if not any(modules.values()):
            raise UserError("the plan has no module in any layer: for the plain model, build the empty list []")
        groups = spec(modules)
    elif isinstance(modules, list | tuple):
        groups = modules
        for group in groups:
            if not isinstance(group, Mapping) or set(group) != {"method", "options"} or not _is_module(**group):
                shape = '{"method": ..., "options": {...}}'
                raise UserError(f"expected groups {shape}, as of jpeft.plans.plan.spec, got {group!r:.80}")
    else:
        raise UserError(f"expected a plan, {{layer: [jpeft.Entry, ...]}}, or its spec, got {modules!r:.60}")
    factors = {} if rates is None else rates
    if not isinstance(factors, Mapping):
        raise UserError(f"rates must be {{method: positive factor}}, got {factors!r:.60}")
    for name, factor in factors.items():
        if name not in METHODS or not is_a(factor, float) or not factor > 0:
            raise UserError(f"rates must be {{method: positive factor}}, got {name!r:.40}: {factor!r:.40}")
    made = ((make(group["method"], **group["options"]), factors.get(group["method"], 1.0)) for group in groups)
    return chain(*(_faster(member, factor) for transform, factor in made for member in members(transform)))


MOST = 64  # modules in one layer


def _check_layer(layer: Any, entries: Any) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise UserError(f"a plan maps layers, counted from 0, to their modules: got layer {layer!r:.40}")
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Entry) for entry in entries):
        raise UserError(f"layer {layer}: expected a list of jpeft.Entry, got {entries!r:.80}")
    odd = next((entry for entry in entries if not _is_module(*entry)), None)
    if odd is not None:
        raise UserError(f"layer {layer}: expected the name of a method and {{option: value}}, got {odd!r:.80}")
    if len(entries) > MOST:
        raise UserError(f"layer {layer} has {len(entries):,} modules: expected at most {MOST}")
    for entry in entries:
        if "layers" in entry.options:
            raise UserError(f"layer {layer}: the plan sets the layers, so drop the option 'layers' of {entry.method}")


def _is_module(method: Any, options: Any) -> bool:
    return isinstance(method, str) and isinstance(options, Mapping) and all(isinstance(name, str) for name in options)


def _faster(member: Transform, factor: float) -> Transform:
    if factor == 1.0:
        return member
    own = member.rate
    return member._replace(rate=lambda path: factor * (1.0 if own is None else own(path)))


def check(plan: Plan, num_layers: int) -> Plan:
    """Returns the plan if the model has all of its layers.

    Raises:
      UserError: if a layer does not exist; the message names it.
    """
    for layer in plan:
        if not 0 <= layer < num_layers:
            raise UserError(f"the plan names layer {layer}, but the model has layers 0-{num_layers - 1}")
    return plan


def dumps(plan: Plan) -> str:
    """A plan as JSON: {"0": [{"method": "lora", "options": {...}}], ...}, one layer per line."""
    rows = (f'  "{layer}": {json.dumps([_as_dict(entry) for entry in plan[layer]])}' for layer in sorted(plan))
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _as_dict(entry: Entry) -> dict[str, Any]:
    return {"method": entry.method, "options": dict(entry.options)}


def loads(text: str, source: str = "plan") -> Plan:
    """The inverse of `dumps`.

    Args:
      text: JSON.
      source: its name in error messages, such as a file name.

    Raises:
      UserError: if the text is not JSON or not a plan, names a layer twice or no module at all, or has an unknown
        method, an unknown option or a value that does not fit.
    """
    try:
        raw = json.loads(text, object_pairs_hook=files.once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}") from None
    if not isinstance(raw, dict) or not all(
        re.fullmatch("0|[1-9][0-9]{0,5}", layer) and isinstance(raw[layer], list) for layer in raw
    ):
        shape = '{"<layer>": [{"method": ..., "options": {...}}, ...], ...}'
        raise UserError(f"{source} is not a plan: expected {shape}")
    if not any(raw.values()):
        raise UserError(f"{source} has no module in any layer: to train the head alone, use the method 'head'")
    plan = {}
    for layer, entries in raw.items():
        if len(entries) > MOST:
            raise UserError(f"{source}, layer {layer}: {len(entries):,} modules, expected at most {MOST}")
        for entry in entries:
            if not _is_entry(entry):
                raise UserError(f"{source}, layer {layer}: expected a method and its options, got {json.dumps(entry)}")
            if "layers" in entry.get("options", {}):
                raise UserError(f"{source}, layer {layer}: the plan sets the layers, so drop the option 'layers'")
            try:
                layered(entry["method"])
                make(entry["method"], **entry.get("options", {}))
            except UserError as error:
                raise UserError(f"{source}, layer {layer}: {error}") from None
        plan[int(layer)] = [Entry(_current(entry["method"]), entry.get("options", {})) for entry in entries]
    return plan


def _is_entry(raw: Any) -> bool:
    if not isinstance(raw, dict) or not {"method"} <= set(raw) <= {"method", "options"}:
        return False
    return _is_module(raw["method"], raw.get("options", {}))


def read(name_or_path: str) -> Plan:
    """A named plan (see `PLANS`), a JSON file, or JSON itself.

    Raises:
      UserError: if it is none of them.
    """
    if name_or_path.lstrip().startswith("{"):
        return loads(name_or_path)
    if name_or_path in PLANS:
        return {layer: list(entries) for layer, entries in PLANS[name_or_path].items()}
    path = Path(name_or_path)
    if not os.path.isfile(path):  # which, unlike the path's own, is False for a name too long
        given = name_or_path[:60]
        raise UserError(f"plan {given!r} is neither a file nor a named plan: {nearest(given, PLANS)}")
    try:
        return loads(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None


def _layers(prefix: Sequence[int] = (), adapter: Sequence[int] = (), lora: Sequence[int] = ()) -> Plan:
    by_method = {"prefix": prefix, "pfeiffer": adapter, "lora": lora}
    plan = {layer: [Entry(method)] for method, layers in by_method.items() for layer in layers}
    return dict(sorted(plan.items()))


# The plans that the FishPAL thesis code (lucalila/fishpal) prints for its twelve-layer encoders. Its module sizes are
# the defaults here: prefix 10 x 512, adapter reduction factor 16, LoRA rank 8 and alpha 16.
PLANS: dict[str, Plan] = {
    "thesis_mnli": _layers(prefix=[0], adapter=[1, *range(4, 10)], lora=[2, 3, 10, 11]),
    "thesis_mrpc": _layers(prefix=[0], adapter=[1, *range(4, 10)], lora=[2, 3, 10, 11]),
    "thesis_sst2": _layers(prefix=range(5), adapter=range(5, 10), lora=[10, 11]),
}
