"""Folders of Hugging Face `peft`, both ways: what jpeft trained opens there, and what peft trained opens here.

    adapter_config.json         the kind of module, its sizes, and where it sits
    adapter_model.safetensors   its tensors and the head's, kernels as [out, in]

LoRA and its relatives, (IA)3, prefixes, prompts and P-tuning, on BERT and RoBERTa. Checked against peft 0.21.2. What
peft has no words for is an error that says so; a merged model (`jpeft.export --format hf`) always opens there.
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.core.files import read_json, read_safetensors, write_json, write_safetensors
from jpeft.core.site import layer_of, matches
from jpeft.core.transform import FIXED, Leaves, instances
from jpeft.core.tree import flatten, unflatten
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import hf_module, listed, shapes
from jpeft.plans.plan import Spec, build
from jpeft.transforms.registry import METHODS

__all__ = ["Modules", "read", "write"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Options of peft's LoRA that nothing here corresponds to.
OTHERS = (
    "use_qalora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices", "megatron_config",
    "layer_replication",
)  # fmt: skip
LOW_RANK = ("lora", "rslora", "dora", "pissa")
BODY, VIRTUAL = "base_model.model.", "base_model."  # before the names of modules; peft nests prompts less deeply
INSTEAD = "export the merged model, --format hf, if it merges"
EMBEDDING = "embeddings/inputs"  # our site of virtual tokens, and of positions
CORE = "encoder/layer_{}/attention/core"  # of prefixes


class Modules(NamedTuple):
    """Trained modules, as `jpeft.build` and `jpeft.apply` take them.

    Attributes:
      spec: what to build the transform from.
      leaves: of that transform.
      params: base parameters that trained, the head among them; they replace those of the base.
    """

    spec: Spec
    leaves: Leaves
    params: dict[str, Any]


def write(folder: Path, modules: Modules, config: BertConfig, base: str) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` opens, with the same logits.

    Args:
      folder: made if need be.
      modules: the modules, their leaves folded as jpeft saves them.
      config: the shape of the base model.
      base: the base model's name on the hub, or its folder.

    Raises:
      UserError: if peft has no such modules.
    """
    if len(modules.spec) != 1:
        names = " and ".join(entry["method"] for entry in modules.spec) or "no modules"
        raise UserError(f"peft cannot hold {names} in one adapter: export the merged model, --format hf")
    (entry,) = modules.spec
    method, (leaves,) = entry["method"], modules.leaves.values()
    writers = {**dict.fromkeys(LOW_RANK, _low_rank), "ia3": _ia3, "prefix": _prefix}
    writers |= {"prompt": _virtual, "p_tuning": _virtual}
    if method not in writers:
        raise UserError(f"peft has no {method} that computes the same: {INSTEAD}")
    own, tensors = writers[method](entry, leaves, config)
    inner = VIRTUAL if "prompt_embeddings" in tensors else BODY
    flat = {"/".join(path): np.asarray(x, np.float32) for path, x in flatten(modules.params).items()}
    for path, x in flat.items():
        module, _, name = path.rpartition("/")
        weight = {"kernel": "weight", "bias": "bias"}.get(name)
        if weight is None or module.split("/")[0] not in ("classifier", "pooler"):
            raise UserError(f"peft's {method} cannot hold {path}, which trained as well: export the merged model")
        tensors[f"{inner}{hf_module(module, config.model_type)}.{weight}"] = x.T if name == "kernel" else x
    about = {
        "task_type": "TOKEN_CLS" if config.by_token else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": sorted({path.split("/")[0] for path in flat}),
    }
    write_safetensors(folder / WEIGHTS, {k: np.asarray(x, np.float32) for k, x in tensors.items()}, {"format": "pt"})
    write_json(folder / CONFIG, {**own, **about})


def _low_rank(entry: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    method, options = entry["method"], entry["options"]
    if options.get("gate"):
        raise UserError("peft has no gated LoRA")
    tensors: dict[str, Any] = {}
    ranks, alphas = {}, {}
    for path, own in leaves.items():
        a, b, rank = np.asarray(own["a"]), np.asarray(own["b"]), own["a"].shape[-1]
        alpha = _alpha(method, options, path)
        if method == "pissa":  # A B - A0 B0, a LoRA of twice the rank
            start = own[FIXED]
            a, b = np.concatenate([a - start["a"], start["a"]], 1), np.concatenate([b, b - np.asarray(start["b"])])
            rank, alpha = 2 * rank, 2 * alpha
        name = hf_module(path)
        ranks[name], alphas[name] = rank, alpha
        full = f"{BODY}{config.model_type}.{name}"
        tensors[f"{full}.lora_A.weight"], tensors[f"{full}.lora_B.weight"] = a.T, b.T
        if method == "dora":
            tensors[f"{full}.lora_magnitude_vector"] = own["magnitude"]
    rank, alpha = (max(set(x.values()), key=[*x.values()].count) for x in (ranks, alphas))
    about = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks),
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": options.get("dropout", 0.0), "bias": "none", "fan_in_fan_out": False,
        "use_rslora": method == "rslora", "use_dora": method == "dora",
    }  # fmt: skip
    return about, tensors


def _alpha(method: str, options: Mapping[str, Any], path: str) -> float:
    """A site's alpha, by the options that made it."""
    make: Any = METHODS[method].make
    usual = options.get("alpha", inspect.signature(make).parameters["alpha"].default)
    patterns = options.get("alpha_pattern") or {}
    return next((alpha for pattern, alpha in patterns.items() if matches(pattern, path)), usual)


def _ia3(entry: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    del entry
    names = {hf_module(path): path for path in leaves}
    read = sorted(name for name, path in names.items() if path.endswith("output"))  # scaled at their input
    tensors = {
        f"{BODY}{config.model_type}.{name}.ia3_l": np.asarray(leaves[path]["scale"]).reshape(
            (1, -1) if name in read else (-1, 1)
        )
        for name, path in names.items()
    }
    return {"peft_type": "IA3", "target_modules": sorted(names), "feedforward_modules": read}, tensors


def _virtual(entry: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    name = {"prompt": "embedding", "p_tuning": "vectors"}[entry["method"]]  # the latter once folded
    if set(leaves) != {EMBEDDING} or set(leaves[EMBEDDING]) != {name} or entry["options"].get("template") is not None:
        raise UserError(f"peft has no such {entry['method']}: it puts virtual tokens before the words only")
    rows = np.asarray(leaves[EMBEDDING][name])
    return {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"} | _tokens(rows, config), {
        "prompt_embeddings": rows
    }


def _prefix(entry: Mapping[str, Any], leaves: Leaves, config: BertConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    if not entry["options"].get("shift_positions"):
        raise UserError(
            "peft has no such prefix: it counts the positions of the text from the prefix's length on, which jpeft "
            "does only where a prefix was trained with shift_positions=True"
        )
    cores = [CORE.format(i) for i in range(config.num_hidden_layers)]
    if set(leaves) != {EMBEDDING, *cores} or any(set(leaves[path]) != {"key", "value"} for path in cores):
        raise UserError("peft has no such prefix: it puts keys and values into every layer, without gates")
    columns = [np.asarray(leaves[path][name]) for path in cores for name in ("key", "value")]
    rows = np.concatenate(columns, axis=1)
    about = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": config.hidden_size}
    return about | _tokens(rows, config), {"prompt_embeddings": rows}


def _tokens(rows: Any, config: BertConfig) -> dict[str, Any]:
    """What peft wants to know about virtual tokens."""
    return {
        "num_virtual_tokens": len(rows), "token_dim": config.hidden_size, "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers,
    }  # fmt: skip


def read(folder: Path, config: BertConfig) -> Modules:
    """Reads a folder that peft wrote.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`; pickles are never loaded.
      config: the shape of the base model.

    Returns:
      The modules. Dropout is off: it is no part of what was trained.

    Raises:
      UserError: if it is not such a folder, or holds what jpeft has no counterpart for.
    """
    about = read_json(folder / CONFIG)
    kind = about.get("peft_type") if isinstance(about, dict) else None
    readers: dict[str, Callable[..., tuple[dict[str, Any], Leaves, set[str]]]]
    readers = {"LORA": _read_low_rank, "IA3": _read_ia3, "PREFIX_TUNING": _read_prefix}
    readers |= dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), _read_virtual)
    if not isinstance(kind, str) or kind not in readers:
        raise UserError(f"{folder / CONFIG}: peft_type {kind!r:.60} is not supported: {nearest(str(kind), readers)}")
    tensors, _ = read_safetensors(folder / WEIGHTS)
    for name, x in tensors.items():
        if x.dtype.kind not in "fV" or not np.isfinite(np.asarray(x, np.float32)).all():  # bfloat16 is a V
            raise UserError(f"{folder / WEIGHTS}: {name!r:.160} is not finite, or not of floats")
    entry, leaves, used = readers[kind](about, tensors, config)
    params, rest = _trained(tensors, used, config)
    if rest:
        names = listed(f"{name!r:.160}" for name in sorted(rest))
        raise UserError(f"{folder / WEIGHTS} holds {names}, which jpeft cannot place")
    (name,) = instances(build([entry]))
    return Modules([entry], {name: leaves}, params)


def _sites(config: BertConfig) -> dict[str, str]:
    """{peft's name of a module: our path} of all Dense layers of the encoder."""
    inner = (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/output",
        "ffn/intermediate",
        "ffn/output",
    )
    paths = [f"encoder/layer_{i}/{name}" for i in range(config.num_hidden_layers) for name in inner]
    return {f"{config.model_type}.{hf_module(path)}": path for path in paths}


def _by_site(tensors: Mapping[str, Any], ends: tuple[str, ...], config: BertConfig) -> dict[str, dict[str, Any]]:
    """{path: {end: tensor}} of the tensors whose names end so, such as ".lora_A.weight"."""
    found: dict[str, dict[str, Any]] = {}
    for module, path in _sites(config).items():
        own = {end: tensors[name] for end in ends if (name := f"{BODY}{module}{end}") in tensors}
        if own:
            found[path] = own
    return found


def _read_low_rank(
    about: Mapping[str, Any], tensors: Any, config: BertConfig
) -> tuple[dict[str, Any], Leaves, set[str]]:
    for name in OTHERS:
        if about.get(name):
            raise UserError(f"{CONFIG}: {name} has no counterpart here")
    if about.get("bias", "none") != "none" or about.get("fan_in_fan_out"):
        raise UserError(f"{CONFIG}: bias {about.get('bias')!r:.60} and fan_in_fan_out have no counterpart here")
    start = str(about.get("init_lora_weights", True)).lower()
    if start.split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        raise UserError(
            f"{CONFIG}: init_lora_weights {start!r:.60} has changed the base weights; in peft, save_pretrained with "
            "path_initial_model_for_weight_conversion writes a plain LoRA"
        )
    if about.get("use_dora") and about.get("use_rslora"):
        raise UserError(f"{CONFIG}: use_dora together with use_rslora has no counterpart here")
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    found = _by_site(tensors, ends, config)
    method = "dora" if about.get("use_dora") else "rslora" if about.get("use_rslora") else "lora"
    leaves, alphas, ranks = {}, {}, {}
    for path, own in found.items():
        if len(own) != (3 if method == "dora" else 2):
            raise UserError(f"{WEIGHTS}: {path} lacks a tensor of its {method}")
        a, b = own[ends[0]].T, own[ends[1]].T
        _check_shapes(path, config, a, b, own.get(ends[2]))
        leaves[path] = {"a": a, "b": b} | ({"magnitude": own[ends[2]]} if method == "dora" else {})
        ranks[path] = a.shape[1]
        if (said := _patterned(about, "r", "rank_pattern", path)) != ranks[path]:
            raise UserError(f"{WEIGHTS}: {path} has rank {ranks[path]}, {CONFIG} says {said:g}")
        alphas[path] = _patterned(about, "lora_alpha", "alpha_pattern", path)
    _check_targets(about, leaves)
    if not leaves:
        raise UserError(f"{WEIGHTS} holds no LoRA of a BERT or RoBERTa encoder")
    rank, alpha = (max(set(x.values()), key=[*x.values()].count) for x in (ranks, alphas))
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": _targets(leaves)}
    for name, own, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        if others := {path: value for path, value in own.items() if value != usual}:
            options[name] = others
    return {"method": method, "options": options}, leaves, _used(found, ends, config)


def _check_shapes(path: str, config: BertConfig, a: Any, b: Any, magnitude: Any) -> None:
    size_in, size_out = _sizes(path, config)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == size_in and b.shape == (a.shape[1], size_out)
    if not fits or (magnitude is not None and magnitude.shape != (size_out,)):
        raise UserError(
            f"{WEIGHTS}: {path}, of {size_in} to {size_out}, has shapes {a.shape[::-1]} and {b.shape[::-1]}"
        )


def _sizes(path: str, config: BertConfig) -> tuple[int, int]:
    """(in, out) of a Dense layer of the encoder."""
    wide = config.intermediate_size
    return (
        wide if path.endswith("ffn/output") else config.hidden_size,
        wide if path.endswith("ffn/intermediate") else config.hidden_size,
    )


def _read_ia3(about: Mapping[str, Any], tensors: Any, config: BertConfig) -> tuple[dict[str, Any], Leaves, set[str]]:
    found = _by_site(tensors, (".ia3_l",), config)
    for path, own in found.items():
        size_in, size_out = _sizes(path, config)
        at_input, at_output = (1, size_in), (size_out, 1)
        wanted, other = (at_input, at_output) if path.endswith("output") else (at_output, at_input)
        shape = own[".ia3_l"].shape
        if shape == other != wanted:
            raise UserError(
                f"{WEIGHTS}: (IA)3 at {path} scales the layer's {'input' if other == at_input else 'output'}, not here"
            )
        if shape != wanted:
            raise UserError(f"{WEIGHTS}: (IA)3 at {path} has shape {list(shape)} instead of {list(wanted)}")
    leaves = {path: {"scale": own[".ia3_l"].reshape(-1)} for path, own in found.items()}
    if not leaves:
        raise UserError(f"{WEIGHTS} holds no (IA)3 of a BERT or RoBERTa encoder")
    return {"method": "ia3", "options": {"targets": _targets(leaves)}}, leaves, _used(found, (".ia3_l",), config)


def _read_virtual(
    about: Mapping[str, Any], tensors: Any, config: BertConfig
) -> tuple[dict[str, Any], Leaves, set[str]]:
    rows = tensors.get("prompt_embeddings")
    if rows is None or rows.ndim != 2 or rows.shape[1] != config.hidden_size:
        raise UserError(f"{WEIGHTS} holds no prompt_embeddings of width {config.hidden_size}")
    options = {"num_virtual_tokens": len(rows), "start_from": "random"}
    return {"method": "prompt", "options": options}, {EMBEDDING: {"embedding": rows}}, {"prompt_embeddings"}


def _read_prefix(about: Mapping[str, Any], tensors: Any, config: BertConfig) -> tuple[dict[str, Any], Leaves, set[str]]:
    rows, d, n = tensors.get("prompt_embeddings"), config.hidden_size, config.num_hidden_layers
    if rows is None or rows.ndim != 2 or not len(rows) or rows.shape[1] != 2 * n * d:
        raise UserError(f"{WEIGHTS} holds no prompt_embeddings of width {2 * n * d}, keys and values of {n} layers")
    columns = np.split(rows, 2 * n, axis=1)
    leaves: Leaves = {CORE.format(i): {"key": columns[2 * i], "value": columns[2 * i + 1]} for i in range(n)}
    options = {"num_virtual_tokens": len(rows), "mlp_hidden": None, "shift_positions": True}
    return {"method": "prefix", "options": options}, {**leaves, EMBEDDING: {}}, {"prompt_embeddings"}


def _check_targets(about: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises a UserError if there are modules where peft makes none, and so ignores the tensors."""
    targets, layers = about.get("target_modules"), about.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    for path in leaves:
        name = hf_module(path)
        try:
            if isinstance(targets, str):
                there = targets == "all-linear" or re.fullmatch(targets, name) is not None
            else:
                there = any(name == each or name.endswith(f".{each}") for each in targets or ())
            there = there and (not layers or layer_of(path) in layers)
        except (TypeError, OverflowError, RecursionError, re.error) as error:
            told = "target_modules or layers_to_transform is not as peft writes it"
            raise UserError(f"{CONFIG}: {told}: {str(error)!r:.160}") from None
        if not there:
            raise UserError(f"{WEIGHTS} has tensors of {path}, which is not among the targets of {CONFIG}")


def _patterned(about: Mapping[str, Any], usual: str, name: str, path: str) -> float:
    """A site's rank or alpha: of the first pattern that matches the end of peft's name, a regular expression."""
    patterns, found = about.get(name) or {}, about.get(usual, 8)
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", hf_module(path)):
                found = value
                break
    except (AttributeError, OverflowError, RecursionError, re.error) as error:
        raise UserError(f"{CONFIG}: {name} is not {{pattern: number}}: {str(error)!r:.160}") from None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= sys.float_info.max:
        raise UserError(f"{CONFIG}: {usual} and {name} must be positive numbers, got {found!r:.60}")
    return float(found)


def _targets(leaves: Mapping[str, Any]) -> str:
    """A pattern that matches these paths and no others."""
    return "|".join(map(re.escape, leaves))


def _used(found: Mapping[str, Mapping[str, Any]], ends: tuple[str, ...], config: BertConfig) -> set[str]:
    modules = {path: module for module, path in _sites(config).items()}
    return {f"{BODY}{modules[path]}{end}" for path, own in found.items() for end in ends if end in own}


def _trained(tensors: Mapping[str, Any], used: set[str], config: BertConfig) -> tuple[dict[str, Any], set[str]]:
    """The head and the pooler, where they are there, and the names that are neither.

    Raises:
      UserError: if their shapes are not those of the model.
    """
    deep = config.model_type == "roberta" and not config.by_token
    head = ("classifier/dense", "classifier/out_proj") if deep else ("classifier",)
    flat: dict[tuple[str, ...], Any] = {}
    rest = set(tensors) - used
    for path in (*head, "pooler"):
        for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
            wanted = shapes(config).get(f"{path}/{ours}")  # RoBERTa has no pooler
            for prefix in (BODY, VIRTUAL):
                name = f"{prefix}{hf_module(path, config.model_type)}.{theirs}"
                if wanted is None or name not in rest:
                    continue
                if tensors[name].shape != wanted[::-1]:
                    raise UserError(
                        f"{WEIGHTS}: {name} has shape {list(tensors[name].shape)} instead of {list(wanted[::-1])}"
                    )
                rest.remove(name)
                flat[(*path.split("/"), ours)] = tensors[name].T if ours == "kernel" else tensors[name]
    return unflatten(flat), rest
