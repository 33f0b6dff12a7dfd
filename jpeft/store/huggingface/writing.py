"""From modules to peft's folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.files import write_json, write_safetensors
from jpeft.core.site import matches
from jpeft.core.transform import Leaves
from jpeft.core.tree import flatten
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import hf_module
from jpeft.store.huggingface.format import BODY, CONFIG, CORE, EMBEDDING, VIRTUAL, WEIGHTS, Modules
from jpeft.transforms.pissa import difference
from jpeft.transforms.registry import defaults

__all__ = ["write"]

LOW_RANK = ("lora", "rslora", "dora", "pissa")
INSTEAD = "export the merged model, --format hf, if it merges"


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
    if whole := {path.split("/")[0] for path in leaves} & {"classifier", *modules.params}:
        raise UserError(f"peft cannot hold {method} in the {whole.pop()}, which it stores whole: {INSTEAD}")
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
            a, b = map(np.asarray, difference(own))
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
    usual = options.get("alpha", defaults(method)["alpha"])
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
    if config.by_token:
        raise UserError(f"peft would answer for the virtual tokens of {entry['method']}, too: {INSTEAD}")
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
