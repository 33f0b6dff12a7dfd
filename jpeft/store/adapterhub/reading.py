"""Reads folders of `adapters`, which may hold anything: each config as an entry of a plan, its tensors as leaves."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.core.files import read_json, read_safetensors
from jpeft.core.transform import SHARED, Leaves, instances
from jpeft.core.tree import unflatten
from jpeft.models.bert import ACTIVATIONS, BertConfig
from jpeft.models.conversion import hf_module, listed
from jpeft.plans.plan import Spec, build
from jpeft.store.adapterhub.format import (
    ADAPTER_PLACES,
    ATTENTION,
    CLASSES,
    CONFIG,
    CORE,
    FLEXIBLE_LAYERS,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    KINDS,
    PICKLES,
    POOL,
    POOLED,
    WEIGHTS,
    Config,
    Part,
    Slot,
    bottleneck_size,
    check_union,
    flexible,
    head_modules,
    head_slots,
    kind_of,
    lora_places,
    slots_of,
)
from jpeft.store.huggingface import Modules
from jpeft.transforms.parts.linear import LARGEST
from jpeft.transforms.registry import defaults

__all__ = ["read"]


def read(folder: Path, config: BertConfig) -> Modules:
    """Reads a folder that `adapters` wrote.

    Args:
      folder: with `adapter_config.json` and `adapter.safetensors`, and maybe a head; pickles are never loaded.
      config: the shape of the base model.

    Returns:
      The modules, one entry of the spec for each kind and size. Dropout is off: it is no part of what was trained.

    Raises:
      UserError: if it is not such a folder, or holds what jpeft has no counterpart for.
    """
    folder = Path(folder)
    about = _about(folder / CONFIG, config)
    name, given = about.get("name"), about.get("config")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise UserError(f"{folder / CONFIG} is not the config of an adapter: it lacks a name or a config")
    tensors = _weights(folder, WEIGHTS)
    if not any(key.startswith(f"{config.model_type}.") for key in tensors):  # saved from the model without a head
        tensors = {f"{config.model_type}.{key}": x for key, x in tensors.items()}
    tensors = _under_one_name(tensors)
    spec: Spec = []
    leaves: list[Leaves] = []
    parts: list[Part] = []
    used: set[str] = set()
    for own in _configs(given, about["version"]):
        kind = own.get("architecture") or "bottleneck"
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"{CONFIG}: architecture {kind!r:.40} is not supported: {nearest(str(kind), KINDS)}")
        read_one = {"bottleneck": _read_bottleneck, "lora": _read_lora, "prefix_tuning": _read_prefix}
        for entry, whole, layers in read_one.get(kind, _read_prompt)(_known(own, KINDS[kind]), config):
            found, names = _taken(whole, layers, name, config, tensors)
            if layers and len(layers) < config.num_hidden_layers:
                entry["options"]["layers"] = list(layers)
            spec.append(entry)
            leaves.append(found)
            parts.append(Part(whole, tuple(layers), found))
            used |= names
    check_union(parts, config)
    if rest := sorted(set(tensors) - used):
        raise UserError(f"{folder / WEIGHTS} holds {_named(rest)}, which jpeft cannot place")
    try:
        instance = list(instances(build(spec)))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return Modules(spec, dict(zip(instance, leaves, strict=True)), _read_head(folder, config))


def _under_one_name(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without the second name of a LayerNorm before the bottleneck, which is its `adapter_down.0`, too."""
    kept = {}
    for key, x in tensors.items():
        first = key.replace(".adapter_down.0.", ".adapter_norm_before.")
        if first != key and first in tensors:
            if not np.array_equal(x, tensors[first]):
                raise UserError(f"{WEIGHTS}: {key!r:.160} differs from {first!r:.160}, whose second name it is")
            continue
        kept[key] = x
    return kept


def _about(path: Path, config: BertConfig) -> dict[str, Any]:
    """What a config file says of the model, if it is of this model."""
    about = read_json(path)
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, str) or not re.match(r"adapters\.[0-9]{1,9}\.[0-9]{1,9}\b", version):
        raise UserError(
            f"{path} does not say that adapters wrote it: if an older library did, save it again in adapters"
        )
    for field, own in (("model_type", config.model_type), ("hidden_size", config.hidden_size)):
        if about.get(field) != own:
            raise UserError(f"{path} is of another model: {field} {about.get(field)!r:.40} instead of {own!r}")
    return about


def _weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    if not (folder / name).is_file() and (folder / PICKLES[name]).is_file():
        raise UserError(
            f"{folder / PICKLES[name]} is a pickle, which could run code and is never loaded: in adapters, save with "
            f"use_safetensors=True, or write its tensors to {name}"
        )
    tensors, _ = read_safetensors(folder / name)
    for key, x in tensors.items():
        if x.dtype.kind not in "fV" or not np.isfinite(np.asarray(x, np.float32)).all():
            raise UserError(f"{folder / name}: {key!r:.80} is not finite, or not of floats")
    return {key: np.asarray(x, np.float32) for key, x in tensors.items()}


def _configs(given: Config, version: str) -> list[Config]:
    """The configs of a union, or the only one."""
    if given.get("architecture") != "union":
        # Before 1.1, LoRA did not scale by alpha; `adapters` corrects it in the same way.
        old = tuple(int(part) for part in version.split(".")[1:3]) < (1, 1)
        return [{**given, "alpha": given.get("r")} if old and given.get("architecture") == "lora" else given]
    configs = given.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(own, dict) for own in configs):
        raise UserError(f"{CONFIG}: a union has a list of configs, got {configs!r:.60}")
    return configs


def _known(own: Config, usual: Config) -> Config:
    """A config with all fields; one that is not known must be off."""
    for field, value in own.items():
        if field not in (*usual, "architecture") and value not in (None, False):
            raise UserError(f"{CONFIG}: {field!r:.40} {value!r:.40} has no counterpart here")
    whole = {**usual, **own}
    for field, value in usual.items():
        if isinstance(value, bool) and not isinstance(whole[field], bool) and field != "residual_before_ln":
            raise UserError(f"{CONFIG}: {field} must be true or false, got {whole[field]!r:.40}")
    return whole


def _refuse(whole: Config, *fields: tuple[str, Any]) -> None:
    """Raises a UserError for the first field with another value than the one that we compute."""
    for field, wanted in fields:
        value = whole[field]
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise UserError(f"{CONFIG}: {field} {value!r:.40} has no counterpart here, only {wanted!r}")


def _number(field: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{CONFIG}: {field} must be a positive number, got {value!r:.40}")
    return value


def _count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise UserError(f"{CONFIG}: {field} must be an integer from 1 to {LARGEST:,}, got {value!r:.40}")
    return value


def _kept(whole: Config, config: BertConfig) -> tuple[int, ...]:
    """The layers that a config does not leave out."""
    out = whole["leave_out"] or []
    if not isinstance(out, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in out):
        raise UserError(f"{CONFIG}: leave_out must be a list of layers, got {out!r:.60}")
    kept = tuple(i for i in range(config.num_hidden_layers) if i not in set(out))
    if not kept:
        raise UserError(f"{CONFIG}: leave_out names every layer")
    return kept


Found = list[tuple[dict[str, Any], Config, Sequence[int]]]  # our entry, the config, and its layers


def _read_bottleneck(whole: Config, config: BertConfig) -> Found:
    _refuse(whole, ("phm_layer", False), ("original_ln_after", True), ("inv_adapter", None))
    options: dict[str, Any] = {}
    if whole["is_parallel"]:
        method = "parallel"
        _refuse(whole, ("mh_adapter", False), ("output_adapter", True))
    else:
        method = "pfeiffer" if whole["original_ln_before"] else "houlsby"
        if whole["original_ln_before"] or whole["residual_before_ln"] is not False:
            _refuse(whole, ("residual_before_ln", True))
        if whole["ln_after"]:
            _refuse(whole, ("adapter_residual_before_ln", False))
        places = [place for flag, place in ADAPTER_PLACES.items() if whole[flag]]
        if not places:
            raise UserError(f"{CONFIG}: mh_adapter and output_adapter are both off")
        if (targets := "|".join(places)) != defaults(method)["targets"]:
            options["targets"] = targets
    activation = whole["non_linearity"]
    if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
        raise UserError(
            f"{CONFIG}: non_linearity {activation!r:.40} is unknown: {nearest(str(activation), ACTIVATIONS)}"
        )
    options["activation"] = activation.lower()
    if whole["scaling"] == "learned":
        options["learned_scale"] = True
    else:
        options["scale"] = _number("scaling", whole["scaling"])
    for flag, ours in (("use_gating", "gate"), ("ln_before", "ln_before"), ("ln_after", "ln_after")):
        if whole[flag]:
            options[ours] = True
    factors, given = {}, whole["reduction_factor"]
    for layer in _kept(whole, config):
        own = given.get(str(layer), given.get("default")) if isinstance(given, dict) else given
        factors[layer] = _number("reduction_factor", own)
    sizes = {layer: bottleneck_size(factor, config.hidden_size) for layer, factor in factors.items()}
    found: Found = []
    for size in dict.fromkeys(sizes.values()):  # several sizes are several instances here
        layers = [layer for layer, own in sizes.items() if own == size]
        entry = {"method": method, "options": {"bottleneck": size, **options}}
        found.append((entry, {**whole, "reduction_factor": factors[layers[0]]}, layers))
    return found


def _read_lora(whole: Config, config: BertConfig) -> Found:
    _refuse(whole, ("use_dora", False), ("vera_d", None), ("vera_b", None))
    matrices = whole["attn_matrices"]
    if not isinstance(matrices, list) or not all(isinstance(key, str) and key in ATTENTION for key in matrices):
        raise UserError(f"{CONFIG}: attn_matrices must be a list of 'q', 'k' and 'v', got {matrices!r:.60}")
    places = lora_places(whole)
    if not places:
        raise UserError(f"{CONFIG}: a LoRA at no place")
    layers = _kept(whole, config)
    if whole["composition_mode"] == "scale":
        _refuse(whole, ("r", 1), ("alpha", 1), ("use_gating", False), ("output_lora", False))
        options: dict[str, Any] = {"placement": "before"}
        if set(places) != {"attention/key", "attention/value", "ffn/intermediate"}:
            options["targets"] = "|".join(places)
        return [({"method": "ia3", "options": options}, whole, layers)]
    _refuse(whole, ("composition_mode", "add"))
    options = {"rank": _count("r", whole["r"]), "alpha": _number("alpha", whole["alpha"]), "targets": "|".join(places)}
    if whole["use_gating"]:
        options["gate"] = True
    return [({"method": "lora", "options": options}, whole, layers)]


def _read_prefix(whole: Config, config: BertConfig) -> Found:
    if whole["use_gating"]:
        _refuse(whole, ("shared_gating", True))
    options: dict[str, Any] = {"num_virtual_tokens": _count("prefix_length", whole["prefix_length"])}
    if whole["flat"]:
        options["mlp_hidden"] = None
    else:
        _refuse(whole, ("non_linearity", "tanh"))
        options["mlp_hidden"] = _count("bottleneck_size", whole["bottleneck_size"])
    if whole["use_gating"]:
        options["gate"] = True
    return [({"method": "prefix", "options": options}, whole, _kept(whole, config))]


def _read_prompt(whole: Config, config: BertConfig) -> Found:
    del config
    _refuse(whole, ("combine", "prefix"))
    size = _count("prompt_length", whole["prompt_length"])
    options = {"num_virtual_tokens": size, "start_from": "random", "placement": "states"}
    return [({"method": "prompt", "options": options}, whole, ())]


def _taken(
    whole: Config, layers: Sequence[int], name: str, config: BertConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[Leaves, set[str]]:
    """Our leaves of one config, and the names of the tensors that they came from."""
    flat: dict[tuple[str, ...], np.ndarray] = {}
    used: set[str] = set()
    if kind_of(whole) == "prefix_tuning":
        flat, used = _taken_prefix(whole, layers, name, config, tensors)
    slots = slots_of(whole, layers, name, config)
    return _from_slots(slots, tensors, WEIGHTS, flat), used | set(slots)


def _from_slots(
    slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray], file: str, flat: dict[tuple[str, ...], np.ndarray]
) -> Leaves:
    """Adds what is at the slots to flat leaves, and nests them."""
    for key, slot in slots.items():
        x = _checked(tensors, key, slot.shape, file)
        if slot.path[-1] == "scale":
            x = x.reshape(-1)
        flat[slot.path] = x.T if slot.path[-1] in ("kernel", "a", "b") else x
    return unflatten(flat)


def _named(names: Sequence[str]) -> str:
    """Names from a file, which may hold anything, for one line of an error."""
    return listed([f"{name!r:.160}" for name in names])


def _checked(tensors: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], file: str) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"{file} lacks {key!r:.160}")
    if tensors[key].shape != shape:
        raise UserError(f"{file}: {key!r:.160} has shape {list(tensors[key].shape)} instead of {list(shape)}")
    return tensors[key]


def _taken_prefix(
    whole: Config, layers: Sequence[int], name: str, config: BertConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[tuple[str, ...], np.ndarray], set[str]]:
    rows, d, n = whole["prefix_length"], config.hidden_size, 2 * len(layers)
    stems = [POOL.format(name), *(POOLED.format(i, name) for i in range(config.num_hidden_layers))]
    used: set[str] = set()

    def one(end: str, shape: tuple[int, ...]) -> np.ndarray:
        keys = [key for stem in stems if (key := f"{config.model_type}.{stem}.{end}") in tensors]
        used.update(keys)
        found = [_checked(tensors, key, shape, WEIGHTS) for key in keys]
        if not found:
            raise UserError(f"{WEIGHTS} lacks the prefix's {end}")
        if any(not np.array_equal(x, found[0]) for x in found):
            raise UserError(f"{WEIGHTS} holds several {end} of one prefix, which differ")
        return found[0]

    sites = [(f"encoder/layer_{i}/{CORE}", half) for i in layers for half in ("key", "value")]
    if whole["flat"]:
        columns = one("control_trans", (rows * n * d,)).reshape(rows, n, d)
        return {site: np.ascontiguousarray(columns[:, i]) for i, site in enumerate(sites)}, used
    hidden = whole["bottleneck_size"]
    flat: dict[tuple[str, ...], np.ndarray] = {
        (SHARED, "embedding"): one("wte.weight", (rows, d)),
        (SHARED, "mlp", "kernel"): one("control_trans.0.weight", (hidden, d)).T,
        (SHARED, "mlp", "bias"): one("control_trans.0.bias", (hidden,)),
    }
    kernels, biases = one("control_trans.2.weight", (n * d, hidden)), one("control_trans.2.bias", (n * d,))
    for i, site in enumerate(sites):
        flat[(*site, "kernel")] = kernels[i * d : (i + 1) * d].T
        flat[(*site, "bias")] = biases[i * d : (i + 1) * d]
    return flat, used


def _read_head(folder: Path, config: BertConfig) -> dict[str, Any]:
    """The head, if there is one."""
    if not any((folder / file).is_file() for file in (HEAD_CONFIG, HEAD_WEIGHTS, PICKLES[HEAD_WEIGHTS])):
        return {}
    about = _about(folder / HEAD_CONFIG, config)
    modules = head_modules(config)
    if about.get("model_class") == CLASSES[config.model_type]:
        names = {module: hf_module(module) for module in modules}
    else:  # of the classes whose heads are flexible: those that compute the same
        own, name = about.get("config"), about.get("name")
        if isinstance(own, dict) and own.get("layers") == 2:
            modules = head_modules(config, layers=2)
        wanted = flexible(len(modules))
        if not isinstance(own, dict) or not isinstance(name, str):
            raise UserError(f"{folder / HEAD_CONFIG} is not of {CLASSES[config.model_type]}, nor of a flexible head")
        for field, value in wanted.items():
            if own.get(field, field == "bias") != value:
                raise UserError(f"{HEAD_CONFIG}: {field} {own.get(field)!r:.40} has no counterpart, only {value!r}")
        names = {module: f"heads.{name}.{i}" for module, i in zip(modules, FLEXIBLE_LAYERS, strict=False)}
    tensors = _weights(folder, HEAD_WEIGHTS)
    slots = head_slots(config, names)
    if rest := sorted(set(tensors) - set(slots)):
        raise UserError(f"{folder / HEAD_WEIGHTS} holds {_named(rest)}, which jpeft cannot place")
    return _from_slots(slots, tensors, HEAD_WEIGHTS, {})
