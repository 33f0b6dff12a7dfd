"""Folders of AdapterHub's `adapters`, both ways: what jpeft trained opens there, and what that trained opens here.

    adapter_config.json      which method, its sizes, and the layers that it leaves out; several methods are a union
    adapter.safetensors      its tensors, kernels as [out, in]
    head_config.json         the head's kind and labels
    model_head.safetensors   the head's tensors

Bottleneck adapters, LoRA, (IA)3, prefixes and prompts, and any choice of them by layer, on BERT and RoBERTa. The names
of the tensors do not tell a parallel adapter from a sequential one: only the config does. The format is that of
adapters 1.3.0 (`save_adapter` with `use_safetensors=True`); the pickles that it writes otherwise are never loaded.
"""

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.core.files import read_json, read_safetensors, write_json, write_safetensors
from jpeft.core.site import matches
from jpeft.core.transform import FIXED, SHARED, Leaves, checked, instances
from jpeft.core.tree import flatten, unflatten
from jpeft.models.bert import ACTIVATIONS, BertConfig
from jpeft.models.conversion import hf_module, listed
from jpeft.plans.plan import Spec, build
from jpeft.store.huggingface import Modules
from jpeft.transforms.parts.linear import LARGEST
from jpeft.transforms.registry import METHODS

__all__ = ["read", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
PICKLES = {WEIGHTS: "pytorch_adapter.bin", HEAD_WEIGHTS: "pytorch_model_head.bin"}
VERSION = "adapters.1.3.0"  # what the format was checked with; `adapters` corrects what older versions wrote
CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}
INSTEAD = "export another format, --format hf if the modules merge, else --format stablehlo"

Config = dict[str, Any]  # of one method, as `adapters` has it
PROMPT = "encoder"  # our site of prompts
# The fields of each kind of config, as `adapters` itself writes them.
BOTTLENECK: Config = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "relu", "original_ln_after": True, "original_ln_before": False, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
LORA: Config = {
    "alpha": 8, "architecture": "lora", "attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0,
    "dtype": None, "init_weights": "lora", "init_weights_seed": None, "intermediate_lora": False, "leave_out": [],
    "output_lora": False, "r": 8, "selfattn_lora": True, "use_dora": False, "use_gating": False, "vera_b": None,
    "vera_d": None,
}  # fmt: skip
PREFIX: Config = {
    "architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": True, "dropout": 0.0,
    "encoder_prefix": True, "flat": False, "init_weights_seed": None, "leave_out": [], "non_linearity": "tanh",
    "prefix_length": 30, "shared_gating": True, "use_gating": False,
}  # fmt: skip
PROMPTS: Config = {
    "architecture": "prompt_tuning", "combine": "prefix", "init_weights_seed": None, "prompt_init": "random_uniform",
    "prompt_init_text": None, "prompt_length": 10,
}  # fmt: skip
KINDS = {"bottleneck": BOTTLENECK, "lora": LORA, "prefix_tuning": PREFIX, "prompt_tuning": PROMPTS}
# Where a config puts modules: its flags, and our paths in a layer.
ADAPTER_PLACES = {"mh_adapter": "attention_add_norm", "output_adapter": "ffn_add_norm"}
ATTENTION = {"q": "attention/query", "k": "attention/key", "v": "attention/value"}
LORA_PLACES = {"intermediate_lora": "ffn/intermediate", "output_lora": "ffn/output"}
CORE = "attention/core"


class Part(NamedTuple):
    """One config and what is in it.

    Attributes:
      config: as `adapters` has it, but for the layers that it leaves out.
      layers: where its modules are; none for a prompt.
      leaves: ours, {path: leaves}, and maybe "shared".
    """

    config: Config
    layers: tuple[int, ...]
    leaves: Leaves


class Slot(NamedTuple):
    """A tensor of `adapters`: the path of our leaf, and the tensor's shape."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


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
    _check_union(parts, config)
    every = range(config.num_hidden_layers)
    configs = [
        {**part.config, "leave_out": [i for i in every if i not in part.layers]} if part.layers else part.config
        for part in parts
    ]
    head, head_config = _head_tensors(modules.params, config), None
    about = {
        "hidden_size": config.hidden_size, "model_class": CLASSES[config.model_type], "model_name": base,
        "model_type": config.model_type, "version": VERSION,
    }  # fmt: skip
    if head:
        names = labels or [f"LABEL_{i}" for i in range(config.num_labels)]
        ids = {label: i for i, label in enumerate(names)}
        head_config = {"config": None, "label2id": ids, "name": None, "num_labels": config.num_labels, **about}
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
        method, options = entry["method"], _options(entry["method"], entry["options"])
        if method not in ("mam", "unipelt"):
            yield method, options
            continue
        gate = {"gate": method == "unipelt", "layers": options["layers"]}
        yield "prefix", _options("prefix", {k: options[k] for k in ("num_virtual_tokens", "mlp_hidden")} | gate)
        if method == "mam":
            yield "parallel", _options("parallel", {k: options[k] for k in ("bottleneck", "scale")} | gate)
        else:
            yield "pfeiffer", _options("pfeiffer", {"reduction_factor": options["reduction_factor"]} | gate)
            if options["variant"] == "apl":
                yield "lora", _options("lora", {"rank": options["rank"]} | gate)


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    make: Any = METHODS[method].make
    return {name: given.get(name, p.default) for name, p in inspect.signature(make).parameters.items()}


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
    activation = options["activation"] or _options(kind, {})["activation"]
    scaling = "learned" if options.get("learned_scale") else float(options.get("scale", 1.0))
    configs: dict[int, Config] = {}
    for layer, own in _by_layer(method, leaves, places).items():
        (size,) = {x["down"]["kernel"].shape[1] for x in own.values()}
        flags = {flag: place in own for flag, place in ADAPTER_PLACES.items()}
        configs[layer] = {
            **BOTTLENECK,
            **({"mh_adapter": False, "output_adapter": True} if kind == "parallel" else flags),
            "reduction_factor": _factor(config.hidden_size, size),
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


def _factor(d: int, size: int) -> int | float:
    """The reduction factor from which `adapters` computes this bottleneck, max(1, int(d // factor))."""
    if d % size == 0:
        return d // size
    factor = d / size
    while int(d // factor) < size:  # where rounding made the quotient too small
        factor = math.nextafter(factor, 0)
    return factor


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
                start = own[FIXED]
                a, b = np.concatenate([a - start["a"], start["a"]], 1), np.concatenate([b, b - np.asarray(start["b"])])
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
            raise UserError(f"adapters' (IA)3 scales no input, as that at {path} does: export --format hf, merged")
    layers = _by_layer("(IA)3", leaves, (*ATTENTION.values(), "ffn/intermediate"))
    as_ia3 = {"composition_mode": "scale", "init_weights": "ia3", "r": 1, "alpha": 1}
    return _grouped({i: {**LORA, **as_ia3, **_lora_flags(own)} for i, own in layers.items()}, leaves)


def _prefix_parts(options: Mapping[str, Any], leaves: Leaves) -> list[Part]:
    shared = leaves.get(SHARED)
    layers = _by_layer("prefix", {path: own for path, own in leaves.items() if path != SHARED}, (CORE,))
    rows = len(shared["embedding"]) if shared else len(next(iter(layers.values()))[CORE]["key"])
    mlp = {"bottleneck_size": len(shared["mlp"]["bias"])} if shared else {}
    own = {"flat": not shared, "prefix_length": rows, "use_gating": options["gate"]}
    return [Part({**PREFIX, **mlp, **own}, tuple(layers), leaves)]


def _check_union(parts: Sequence[Part], config: BertConfig) -> None:
    """Holds parts against what `adapters` accepts in one adapter (its `ConfigUnion.validate` and `match`).

    Raises:
      UserError: if two are at one place, or could not be told apart.
    """
    seen: dict[tuple[int, str], str] = {}
    for part in parts:
        for layer in part.layers or (-1,):
            for place in _places(part.config):
                if (layer, place) in seen:
                    where = f"layer {layer} has two" if part.layers else "there are two"
                    raise UserError(f"adapters has room for one {place} in a layer, and {where}: {INSTEAD}")
                seen[layer, place] = place
    for i, one in enumerate(parts):
        for other in parts[:i]:
            kind = _kind(one.config)
            if kind != _kind(other.config):
                continue
            if kind == "prefix_tuning":
                raise UserError(f"adapters has room for one prefix, of one length and with one MLP: {INSTEAD}")
            everywhere = len(one.layers) == len(other.layers) == config.num_hidden_layers
            if everywhere and not (
                kind == "bottleneck" and all(one.config[flag] != other.config[flag] for flag in ADAPTER_PLACES)
            ):
                raise UserError(f"adapters has room for one {kind} config in all layers, and there are two: {INSTEAD}")


def _places(config: Config) -> list[str]:
    kind = _kind(config)
    flags = {"bottleneck": ADAPTER_PLACES, "lora": ("selfattn_lora", *LORA_PLACES)}.get(kind)
    return [kind] if flags is None else [flag for flag in flags if config[flag]]


def _kind(config: Config) -> str:
    return config.get("architecture") or "bottleneck"


def _tensors(part: Part, name: str, config: BertConfig) -> dict[str, np.ndarray]:
    """The tensors of a part, by their names in `adapters`."""
    found = _prefix_tensors(part, name, config) if _kind(part.config) == "prefix_tuning" else {}
    flat = flatten(part.leaves)
    for key, slot in _slots(part.config, part.layers, name, config).items():
        x = np.asarray(flat[slot.path])
        found[key] = x.T if slot.path[-1] in ("kernel", "a", "b") else x.reshape(slot.shape)
    return {key: np.asarray(x, np.float32) for key, x in found.items()}


def _slots(config: Config, layers: Sequence[int], name: str, model: BertConfig) -> dict[str, Slot]:
    """The tensors of one config by name; of a prefix, those of its gates only."""
    kind, d = _kind(config), model.hidden_size
    if kind == "prompt_tuning":
        key = f"{model.model_type}.prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight"
        return {key: Slot((PROMPT, "embedding"), (config["prompt_length"], d))}
    slots: dict[str, Slot] = {}
    for layer in layers:
        path = f"encoder/layer_{layer}"
        stem = f"{model.model_type}.encoder.layer.{layer}"
        if kind == "prefix_tuning":
            if config["use_gating"]:
                slots |= _gate(f"{stem}.attention.self.prefix_tuning.prefix_gates.{name}", (f"{path}/{CORE}",), d)
            continue
        if kind == "bottleneck":
            for flag, place in ADAPTER_PLACES.items():
                if config[flag]:
                    ours = f"{path}/ffn" if config["is_parallel"] else f"{path}/{place}"
                    norm = hf_module(f"{path}/{place}/LayerNorm", model.model_type)
                    slots |= _bottleneck_slots(config, f"{norm.removesuffix('LayerNorm')}adapters.{name}", ours, d)
            continue
        for place in _lora_places(config):
            ours = f"{path}/{place}"
            size_in = model.intermediate_size if place == "ffn/output" else d
            size_out = model.intermediate_size if place == "ffn/intermediate" else d
            key = f"{hf_module(ours, model.model_type)}.loras.{name}"
            if config["composition_mode"] == "scale":
                slots[f"{key}.lora_B"] = Slot((ours, "scale"), (size_out, 1))
                continue
            slots[f"{key}.lora_A"] = Slot((ours, "a"), (config["r"], size_in))
            slots[f"{key}.lora_B"] = Slot((ours, "b"), (size_out, config["r"]))
            if config["use_gating"]:
                slots |= _gate(f"{key}.gate", (ours,), size_in)
    return slots


def _lora_places(config: Config) -> list[str]:
    own = [ATTENTION[key] for key in ATTENTION if config["selfattn_lora"] and key in config["attn_matrices"]]
    return own + [place for flag, place in LORA_PLACES.items() if config[flag]]


def _gate(key: str, path: tuple[str, ...], d: int) -> dict[str, Slot]:
    return {
        f"{key}.weight": Slot((*path, "gate", "kernel"), (1, d)),
        f"{key}.bias": Slot((*path, "gate", "bias"), (1,)),
    }


def _bottleneck_slots(config: Config, key: str, path: str, d: int) -> dict[str, Slot]:
    b = _size(config["reduction_factor"], d)
    down = f"{key}.adapter_down.{int(config['ln_before'])}"  # a sequence, in which a LayerNorm comes first
    slots = {
        f"{down}.weight": Slot((path, "down", "kernel"), (b, d)),
        f"{down}.bias": Slot((path, "down", "bias"), (b,)),
        f"{key}.adapter_up.weight": Slot((path, "up", "kernel"), (d, b)),
        f"{key}.adapter_up.bias": Slot((path, "up", "bias"), (d,)),
    }
    if config["scaling"] == "learned":
        slots[f"{key}.scaling"] = Slot((path, "scale"), (1,))
    if config["use_gating"]:
        slots |= _gate(f"{key}.gate", (path,), d)
    for end in ("before", "after"):
        if config[f"ln_{end}"]:
            slots[f"{key}.adapter_norm_{end}.weight"] = Slot((path, f"ln_{end}", "scale"), (d,))
            slots[f"{key}.adapter_norm_{end}.bias"] = Slot((path, f"ln_{end}", "bias"), (d,))
    return slots


def _size(factor: float, d: int) -> int:
    """The bottleneck that `adapters` computes."""
    size = d // factor
    if not size <= LARGEST:
        raise UserError(f"{CONFIG}: reduction_factor {factor!r:.40} gives no bottleneck at hidden size {d}")
    return max(1, int(size))


POOL = "prefix_tuning.prefix_tunings.{}.self_prefix"
POOLED = "encoder.layer.{}.attention.self.prefix_tuning.pool.prefix_tunings.{}.self_prefix"  # the same, in every layer


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


def _head_modules(config: BertConfig) -> tuple[str, ...]:
    return ("classifier/dense", "classifier/out_proj") if config.model_type == "roberta" else ("classifier",)


def _head_slots(config: BertConfig, names: Mapping[str, str]) -> dict[str, Slot]:
    """The head's tensors, by {our module: the name there}."""
    slots: dict[str, Slot] = {}
    for module, key in names.items():
        out = config.hidden_size if module.endswith("dense") else config.num_labels
        slots[f"{key}.weight"] = Slot((*module.split("/"), "kernel"), (out, config.hidden_size))
        slots[f"{key}.bias"] = Slot((*module.split("/"), "bias"), (out,))
    return slots


def _head_tensors(params: Mapping[str, Any], config: BertConfig) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(x, np.float32) for path, x in flatten(params).items()}
    slots = _head_slots(config, {module: hf_module(module) for module in _head_modules(config)})
    if other := [path for path in flat if path not in {slot.path for slot in slots.values()}]:
        raise UserError(f"adapters cannot hold {'/'.join(other[0])}, which trained as well: {INSTEAD}")
    if not flat:
        return {}
    return {key: flat[slot.path].T if len(slot.shape) == 2 else flat[slot.path] for key, slot in slots.items()}


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
    about = _about(folder / CONFIG, config)
    name, given = about.get("name"), about.get("config")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise UserError(f"{folder / CONFIG} is not the config of an adapter: it lacks a name or a config")
    tensors = _weights(folder, WEIGHTS)
    if not any(key.startswith(f"{config.model_type}.") for key in tensors):  # saved from the model without a head
        tensors = {f"{config.model_type}.{key}": x for key, x in tensors.items()}
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
    _check_union(parts, config)
    if rest := sorted(set(tensors) - used):
        raise UserError(f"{folder / WEIGHTS} holds {_named(rest)}, which jpeft cannot place")
    try:
        instance = list(instances(build(spec)))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return Modules(spec, dict(zip(instance, leaves, strict=True)), _read_head(folder, config))


def _about(path: Path, config: BertConfig) -> dict[str, Any]:
    """What a config file says of the model, if it is of this model."""
    about = read_json(path)
    version = about.get("version") if isinstance(about, dict) else None
    if not isinstance(version, str) or not re.match(r"adapters\.[0-9]{1,9}\.[0-9]{1,9}\b", version):
        raise UserError(f"{path} does not say that adapters wrote it: what older libraries wrote, load and save there")
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
        if (targets := "|".join(places)) != _options(method, {})["targets"]:
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
    sizes = {layer: _size(factor, config.hidden_size) for layer, factor in factors.items()}
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
    places = _lora_places(whole)
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
    if _kind(whole) == "prefix_tuning":
        flat, used = _taken_prefix(whole, layers, name, config, tensors)
    slots = _slots(whole, layers, name, config)
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
    modules = _head_modules(config)
    if about.get("model_class") == CLASSES[config.model_type]:
        names = {module: hf_module(module) for module in modules}
    else:  # of the classes whose heads are flexible: those that compute the same
        own, name = about.get("config"), about.get("name")
        layers = len(modules)
        wanted = {"head_type": "classification", "layers": layers, "use_pooler": layers == 1, "bias": True}
        if layers > 1:
            wanted["activation_function"] = "tanh"
        if not isinstance(own, dict) or not isinstance(name, str):
            raise UserError(f"{folder / HEAD_CONFIG} is not of {CLASSES[config.model_type]}, nor of a flexible head")
        for field, value in wanted.items():
            if own.get(field, field == "bias") != value:
                raise UserError(f"{HEAD_CONFIG}: {field} {own.get(field)!r:.40} has no counterpart, only {value!r}")
        names = {module: f"heads.{name}.{i}" for module, i in zip(modules, (1, 4), strict=False)}
    tensors = _weights(folder, HEAD_WEIGHTS)
    slots = _head_slots(config, names)
    if rest := sorted(set(tensors) - set(slots)):
        raise UserError(f"{folder / HEAD_WEIGHTS} holds {_named(rest)}, which jpeft cannot place")
    return _from_slots(slots, tensors, HEAD_WEIGHTS, {})
