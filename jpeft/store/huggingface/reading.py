"""From peft's folders to modules."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError, nearest
from jpeft.core.files import read_json, read_safetensors
from jpeft.core.site import layer_of
from jpeft.core.transform import Leaves, instances
from jpeft.core.tree import unflatten
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import hf_module, listed, shapes
from jpeft.plans.plan import build
from jpeft.store.huggingface.format import BODY, CONFIG, CORE, EMBEDDING, VIRTUAL, WEIGHTS, Modules

__all__ = ["read"]

# Options of peft's LoRA that nothing here corresponds to.
OTHERS = (
    "use_qalora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices", "megatron_config",
    "layer_replication",
)  # fmt: skip


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
    folder = Path(folder)
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
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}  # what trains on is float32
    entry, leaves, used = readers[kind](about, tensors, config)
    params, rest = _trained(tensors, used, config)
    ours = {path.split("/")[0] for path in shapes(config)}
    saved = about.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise UserError(f"{folder / CONFIG}: modules_to_save must be names, got {saved!r:.60}")
    for name in sorted(ours & set(saved) - set(params)):
        raise UserError(f"{folder / WEIGHTS} lacks the {name}, which {CONFIG} names among modules_to_save")
    if rest:
        names = listed(f"{name!r:.160}" for name in sorted(rest))
        raise UserError(f"{folder / WEIGHTS} holds {names}, which jpeft cannot place")
    (name,) = instances(build([entry]))
    return Modules([entry], {name: leaves}, params)


def _sites(config: BertConfig) -> dict[str, str]:
    """{peft's name of a module: our path} of all Dense layers below the head."""
    inner = (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/output",
        "ffn/intermediate",
        "ffn/output",
    )
    paths = [f"encoder/layer_{i}/{name}" for i in range(config.num_hidden_layers) for name in inner]
    paths += ["pooler"] if "pooler/kernel" in shapes(config) else []
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
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
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
        name = hf_module(path, config.model_type)  # patterns and targets may say it in full
        if (said := _patterned(about, "r", "rank_pattern", name)) != ranks[path]:
            raise UserError(f"{WEIGHTS}: {path} has rank {ranks[path]}, {CONFIG} says {said:g}")
        alphas[path] = _patterned(about, "lora_alpha", "alpha_pattern", name)
    _check_targets(about, leaves, config)
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
            theirs, ours = ("input", "output") if other == at_input else ("output", "input")
            raise UserError(f"{WEIGHTS}: (IA)3 at {path} scales the layer's {theirs}, where jpeft scales its {ours}")
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


def _check_targets(about: Mapping[str, Any], leaves: Mapping[str, Any], config: BertConfig) -> None:
    """Raises a UserError if there are modules where peft makes none, and so ignores the tensors, or the other way."""
    targets, layers = about.get("target_modules"), about.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers

    def named(modules: Any, name: str) -> bool:
        if isinstance(modules, str):
            return modules == "all-linear" or re.fullmatch(modules, name) is not None
        return any(name == each or name.endswith(f".{each}") for each in modules or ())

    for name, path in _sites(config).items():
        try:
            there = named(targets, name) and not named(about.get("exclude_modules"), name)
            there = there and (not layers or layer_of(path) in layers)
        except (TypeError, OverflowError, RecursionError, re.error) as error:
            told = "target_modules or layers_to_transform is not as peft writes it"
            raise UserError(f"{CONFIG}: {told}: {str(error)!r:.160}") from None
        if path in leaves and not there:
            raise UserError(f"{WEIGHTS} has tensors of {path}, which is not among the targets of {CONFIG}")
        if there and path not in leaves:
            raise UserError(f"{WEIGHTS} has no tensors of {path}, which is among the targets of {CONFIG}")


def _patterned(about: Mapping[str, Any], usual: str, name: str, module: str) -> float:
    """A module's rank or alpha: of the first pattern that matches its name, or an end of it; a regular expression."""
    patterns, found = about.get(name) or {}, about.get(usual, 8)
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
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
    for path in (*head, "pooler"):
        if len(found := [ours for ours in ("kernel", "bias") if (*path.split("/"), ours) in flat]) == 1:
            raise UserError(f"{WEIGHTS} has the {found[0]} of {path} alone")
    return unflatten(flat), rest
