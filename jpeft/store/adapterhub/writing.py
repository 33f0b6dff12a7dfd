"""Writes folders of `adapters`: the methods of a plan as configs, and their leaves as tensors."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.files import write_json, write_safetensors
from jpeft.core.site import matches
from jpeft.core.transform import FIXED, SHARED, Leaves, checked
from jpeft.core.tree import flatten
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import hf_module
from jpeft.plans.plan import Spec, build
from jpeft.store.adapterhub.format import (
    ADAPTER_PLACES,
    ATTENTION,
    BOTTLENECK,
    CLASSES,
    CONFIG,
    CORE,
    FLEXIBLE_CLASS,
    FLEXIBLE_LAYERS,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    INSTEAD,
    LORA,
    LORA_PLACES,
    POOLED,
    PREFIX,
    PROMPT,
    PROMPTS,
    VERSION,
    WEIGHTS,
    Config,
    Part,
    check_union,
    flexible,
    head_modules,
    head_slots,
    kind_of,
    reduction_factor,
    slots_of,
)
from jpeft.store.huggingface import Modules
from jpeft.transforms.pissa import difference
from jpeft.transforms.registry import defaults

__all__ = ["write"]


def write(
    folder: Path, modules: Modules, config: BertConfig, base: str, labels: Sequence[str] = (), name: str = "jpeft"
) -> None:
    """Writes a folder that `load_adapter(folder, use_safetensors=True)` of `adapters` opens, with the same logits.

    The gates of UniPELT are the exception: there they also average over padding, so only rows without any are alike.

    Args:
      folder: made if need be.
      modules: the modules; their leaves may be folded, as jpeft saves them, or not.
      config: the shape of the base model.
      base: the base model's name on the hub, or its folder.
      labels: the names of the classes.
      name: the adapter's.

    Raises:
      UserError: if `adapters` has no such modules.
    """
    if config.by_token:
        raise UserError(f"heads for words are not written for adapters: {INSTEAD}")
    if not modules.spec:
        raise UserError("adapters cannot hold a head without modules: export the whole model, --format hf")
    atoms = list(_atoms(modules.spec))
    parts: list[Part] = []
    members = checked(build(modules.spec), modules.leaves)
    for (method, options), (instance, member) in zip(atoms, members.items(), strict=True):
        leaves = modules.leaves[instance]
        if member.fold is not None and method != "prefix":  # a prefix may keep its MLP, which `adapters` has as well
            leaves = member.fold(leaves)
        parts += _parts(method, options, leaves, config)
    parts = _joined(parts)
    check_union(parts, config)
    every = range(config.num_hidden_layers)
    configs = [
        {**part.config, "leave_out": [i for i in every if i not in part.layers]} if part.layers else part.config
        for part in parts
    ]
    own_pooler = "pooler" in modules.params  # for which only flexible heads have a place
    names = _head_names(name, config, own_pooler)
    head, head_config = _head_tensors(modules.params, config, names), None
    about = {
        "hidden_size": config.hidden_size, "model_class": CLASSES[config.model_type], "model_name": base,
        "model_type": config.model_type, "version": VERSION,
    }  # fmt: skip
    if head:
        ids = {label: i for i, label in enumerate(labels or [f"LABEL_{i}" for i in range(config.num_labels)])}
        head_config = {"config": None, "label2id": ids, "name": None, "num_labels": config.num_labels, **about}
        if own_pooler:
            own = {**flexible(2), "num_labels": config.num_labels, "label2id": ids, "dropout_prob": None}
            head_config = {**about, "config": own, "name": name, "model_class": FLEXIBLE_CLASS}
    tensors = {key: x for part in parts for key, x in _tensors(part, name, config).items()}
    whole = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, {"config": whole, "name": name, **about})
    if head_config:
        write_safetensors(folder / HEAD_WEIGHTS, head, {"format": "pt"})
        write_json(folder / HEAD_CONFIG, head_config)


def _atoms(spec: Spec) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods that a spec's entries are made of, in the order of its instances, each with all of its options."""
    for entry in spec:
        method, options = entry["method"], {**defaults(entry["method"]), **entry["options"]}
        if method not in ("mam", "unipelt"):
            yield method, options
            continue
        gate = {"gate": method == "unipelt", "layers": options["layers"]}
        own = {k: options[k] for k in ("num_virtual_tokens", "mlp_hidden")}
        yield "prefix", {**defaults("prefix"), **own, **gate}
        if method == "mam":
            yield "parallel", {**defaults("parallel"), **{k: options[k] for k in ("bottleneck", "scale")}, **gate}
        else:
            yield "pfeiffer", {**defaults("pfeiffer"), "reduction_factor": options["reduction_factor"], **gate}
            if options["variant"] == "apl":
                yield "lora", {**defaults("lora"), "rank": options["rank"], **gate}


def _parts(method: str, options: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> list[Part]:
    """The configs of one method: as many as it has kinds of layers."""
    if method in ("pfeiffer", "houlsby", "parallel", "adapterdrop", "adamix", "sparse_adapter"):
        return _bottleneck_parts(method, options, leaves, config)
    if method in ("lora", "rslora", "pissa"):
        return _lora_parts(method, options, leaves)
    if method == "ia3":
        return _ia3_parts(leaves)
    if method == "prefix":
        return _prefix_parts(options, leaves)
    if method == "prompt":
        if set(leaves) != {PROMPT}:
            raise UserError(f"adapters puts a prompt after the embeddings, placement='states' here: {INSTEAD}")
        return [Part({**PROMPTS, "prompt_length": len(leaves[PROMPT]["embedding"])}, (), leaves)]
    raise UserError(f"adapters has no {method} that computes the same: {INSTEAD}")


def _by_layer(method: str, leaves: Leaves, known: Sequence[str]) -> dict[int, dict[str, Leaves]]:
    """{layer: {our path in the layer: leaves}}; a path that is not known is an error."""
    found: dict[int, dict[str, Leaves]] = {}
    for path, own in leaves.items():
        match = re.fullmatch(r"encoder/layer_(\d+)/(.+)", path)
        if not match or match[2] not in known:
            raise UserError(f"adapters has no {method} at {path}: {INSTEAD}")
        found.setdefault(int(match[1]), {})[match[2]] = own
    return dict(sorted(found.items()))


def _grouped(configs: Mapping[int, Config], leaves: Leaves) -> list[Part]:
    """The layers with equal configs together."""
    return _joined([Part(own, (i,), _in_layer(leaves, i)) for i, own in configs.items()])


def _in_layer(leaves: Leaves, layer: int) -> Leaves:
    return {path: own for path, own in leaves.items() if path.startswith(f"encoder/layer_{layer}/")}


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Parts with equal configs in different layers as one. Prefixes with an MLP stay apart: each has its own."""
    joined: dict[str, Part] = {}
    for part in parts:
        key = json.dumps(part.config, sort_keys=True)
        old = joined.get(key)
        if old is None:
            joined[key] = part
        elif set(old.layers) & set(part.layers) or not part.layers or SHARED in part.leaves:
            joined[f"{len(joined)} {key}"] = part
        else:
            layers = tuple(sorted(old.layers + part.layers))
            joined[key] = Part(part.config, layers, {**old.leaves, **part.leaves})
    return list(joined.values())


def _bottleneck_parts(method: str, options: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> list[Part]:
    kind = options.get("kind", method)  # of a sparse adapter
    leaves = {path: _dense(own) for path, own in leaves.items()}
    places = ("ffn",) if kind == "parallel" else tuple(ADAPTER_PLACES.values())
    activation = options["activation"] or defaults(kind)["activation"]
    scaling = "learned" if options.get("learned_scale") else float(options.get("scale", 1.0))
    configs: dict[int, Config] = {}
    for layer, own in _by_layer(method, leaves, places).items():
        (size,) = {x["down"]["kernel"].shape[1] for x in own.values()}
        flags = {flag: place in own for flag, place in ADAPTER_PLACES.items()}
        configs[layer] = {
            **BOTTLENECK,
            **({"mh_adapter": False, "output_adapter": True} if kind == "parallel" else flags),
            "reduction_factor": reduction_factor(config.hidden_size, size),
            "non_linearity": activation,
            "original_ln_before": kind in ("pfeiffer", "adapterdrop"),
            "is_parallel": kind == "parallel",
            "init_weights": "mam_adapter" if kind == "parallel" else "bert",
            "scaling": scaling,
            "use_gating": options.get("gate", False),
            "ln_before": options.get("ln_before", False),
            "ln_after": options.get("ln_after", False),
        }
    return _grouped(configs, leaves)


def _dense(own: Leaves) -> Leaves:
    """An adapter with the kernels of a sparse one written out."""
    down, up = own["down"], own["up"]
    if not isinstance(down["kernel"], Mapping):
        return own
    b, d = len(down["bias"]), len(up["bias"])

    def full(half: Leaves, shape: tuple[int, int]) -> Leaves:
        kernel = np.zeros(shape[0] * shape[1], np.float32)
        kernel[np.asarray(half["kernel"][FIXED]["index"])] = half["kernel"]["values"]
        return {**half, "kernel": kernel.reshape(shape)}

    return {**own, "down": full(down, (d, b)), "up": full(up, (b, d))}


def _lora_parts(method: str, options: Mapping[str, Any], leaves: Leaves) -> list[Part]:
    patterns = options.get("alpha_pattern") or {}
    configs: dict[int, Config] = {}
    kept: Leaves = {}
    for layer, sites in _by_layer(method, leaves, (*ATTENTION.values(), *LORA_PLACES.values())).items():
        sizes: set[tuple[int, float]] = set()
        for place, own in sites.items():
            path = f"encoder/layer_{layer}/{place}"
            alpha = next((x for pattern, x in patterns.items() if matches(pattern, path)), options["alpha"])
            a, b = np.asarray(own["a"]), np.asarray(own["b"])
            rank = a.shape[1]
            if method == "rslora":  # alpha / sqrt(rank) there is (alpha sqrt(rank)) / rank
                alpha = alpha * math.sqrt(rank)
            if method == "pissa":  # A B - A0 B0, a LoRA of twice the rank
                a, b = map(np.asarray, difference(own))
                rank, alpha = 2 * rank, 2 * alpha
            kept[path] = {"a": a, "b": b} | ({"gate": own["gate"]} if "gate" in own else {})
            sizes.add((rank, alpha))
        if len(sizes) > 1:
            raise UserError(f"adapters has LoRA in one size per layer, and layer {layer} has several: {INSTEAD}")
        ((rank, alpha),) = sizes
        configs[layer] = {
            **LORA,
            **_lora_flags(sites),
            "r": rank,
            "alpha": int(alpha) if alpha == int(alpha) else alpha,
            "dropout": options["dropout"],
            "use_gating": options.get("gate", False),
        }
    return _grouped(configs, kept)


def _lora_flags(places: Mapping[str, Any]) -> Config:
    own = [key for key, place in ATTENTION.items() if place in places]
    return {
        "selfattn_lora": bool(own),
        "attn_matrices": own,
        **{flag: place in places for flag, place in LORA_PLACES.items()},
    }


def _ia3_parts(leaves: Leaves) -> list[Part]:
    for path in leaves:
        if path.endswith("output"):
            raise UserError(f"(IA)3 at {path} scales its layer's input, which adapters cannot do: export --format hf")
    layers = _by_layer("(IA)3", leaves, (*ATTENTION.values(), "ffn/intermediate"))
    as_ia3 = {"composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 1}
    return _grouped({i: {**LORA, **as_ia3, **_lora_flags(own)} for i, own in layers.items()}, leaves)


def _prefix_parts(options: Mapping[str, Any], leaves: Leaves) -> list[Part]:
    if options["shift_positions"]:
        raise UserError(
            "adapters counts positions from 0, a prefix with shift_positions does not: export --format peft"
        )
    shared = leaves.get(SHARED)
    layers = _by_layer("prefix", {path: own for path, own in leaves.items() if path != SHARED}, (CORE,))
    rows = len(shared["embedding"]) if shared else len(next(iter(layers.values()))[CORE]["key"])
    mlp = {"bottleneck_size": len(shared["mlp"]["bias"])} if shared else {}
    own = {"flat": not shared, "prefix_length": rows, "use_gating": options["gate"]}
    return [Part({**PREFIX, **mlp, **own}, tuple(layers), leaves)]


def _tensors(part: Part, name: str, config: BertConfig) -> dict[str, np.ndarray]:
    """The tensors of a part, by their names in `adapters`."""
    found = _prefix_tensors(part, name, config) if kind_of(part.config) == "prefix_tuning" else {}
    flat = flatten(part.leaves)
    for key, slot in slots_of(part.config, part.layers, name, config).items():
        x = np.asarray(flat[slot.path])
        found[key] = x.T if slot.path[-1] in ("kernel", "a", "b") else x.reshape(slot.shape)
    return {key: np.asarray(x, np.float32) for key, x in found.items()}


def _prefix_tensors(part: Part, name: str, config: BertConfig) -> dict[str, Any]:
    """Keys and values of the layers that have a prefix, in turn: [P, layer, key or value, d].

    `adapters` has the same tensors under the model and under every layer, and loading any of them sets them all; they
    are written once, under layer 0.
    """
    stem = f"{config.model_type}.{POOLED.format(0, name)}"
    own = [part.leaves[f"encoder/layer_{i}/{CORE}"][half] for i in part.layers for half in ("key", "value")]
    shared = part.leaves.get(SHARED)
    if shared is None:
        return {f"{stem}.control_trans": np.stack([np.asarray(x) for x in own], 1).reshape(-1)}
    return {
        f"{stem}.wte.weight": shared["embedding"],
        f"{stem}.control_trans.0.weight": np.asarray(shared["mlp"]["kernel"]).T,
        f"{stem}.control_trans.0.bias": shared["mlp"]["bias"],
        f"{stem}.control_trans.2.weight": np.concatenate([np.asarray(x["kernel"]).T for x in own]),
        f"{stem}.control_trans.2.bias": np.concatenate([np.asarray(x["bias"]) for x in own]),
    }


def _head_names(name: str, config: BertConfig, own_pooler: bool) -> dict[str, str]:
    """{our module: its name there}."""
    if own_pooler:
        modules = head_modules(config, layers=2)
        return {module: f"heads.{name}.{i}" for module, i in zip(modules, FLEXIBLE_LAYERS, strict=True)}
    return {module: hf_module(module) for module in head_modules(config)}


def _head_tensors(params: Mapping[str, Any], config: BertConfig, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(x, np.float32) for path, x in flatten(params).items()}
    slots = head_slots(config, names)
    if other := [path for path in flat if path not in {slot.path for slot in slots.values()}]:
        raise UserError(f"adapters cannot hold {'/'.join(other[0])}, which trained as well: {INSTEAD}")
    if not flat:
        return {}
    return {key: flat[slot.path].T if len(slot.shape) == 2 else flat[slot.path] for key, slot in slots.items()}
