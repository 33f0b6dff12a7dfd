"""What is in a folder of `adapters`: its files, the fields of its configs, and the name and shape of each tensor."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jpeft.core.errors import UserError
from jpeft.core.transform import Leaves
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import hf_module
from jpeft.transforms.parts.linear import LARGEST

__all__ = [
    "ADAPTER_PLACES", "ATTENTION", "BOTTLENECK", "CLASSES", "CONFIG", "CORE", "FLEXIBLE_CLASS", "FLEXIBLE_LAYERS",
    "HEAD_CONFIG", "HEAD_WEIGHTS", "INSTEAD", "KINDS", "LORA", "LORA_PLACES", "PICKLES", "POOL", "POOLED", "PREFIX",
    "PROMPT", "PROMPTS", "VERSION", "WEIGHTS", "Config", "Part", "Slot", "bottleneck_size", "check_union", "flexible",
    "head_modules", "head_slots", "kind_of", "lora_places", "reduction_factor", "slots_of",
]  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
PICKLES = {WEIGHTS: "pytorch_adapter.bin", HEAD_WEIGHTS: "pytorch_model_head.bin"}
VERSION = "adapters.1.3.0"  # what the format was checked with; `adapters` corrects what older versions wrote
CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}
# BERT's class whose heads are flexible, and the numbers of such a head's two layers: tanh and dropout are between them.
FLEXIBLE_CLASS, FLEXIBLE_LAYERS = "BertAdapterModel", (1, 4)
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
POOL = "prefix_tuning.prefix_tunings.{}.self_prefix"
POOLED = "encoder.layer.{}.attention.self.prefix_tuning.pool.prefix_tunings.{}.self_prefix"  # the same, in every layer


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


def kind_of(config: Config) -> str:
    """The kind of a config, a key of `KINDS`; those of bottleneck adapters do not name theirs."""
    return config.get("architecture") or "bottleneck"


def slots_of(config: Config, layers: Sequence[int], name: str, model: BertConfig) -> dict[str, Slot]:
    """The tensors of one config by name; of a prefix, those of its gates only.

    Args:
      config: with all fields of its kind.
      layers: where its modules are.
      name: the adapter's.
      model: the shape of the base model.

    Returns:
      {the tensor's name: where it goes here, and its shape}.

    Raises:
      UserError: if the config's reduction factor gives no bottleneck.
    """
    kind, d = kind_of(config), model.hidden_size
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
        for place in lora_places(config):
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


def lora_places(config: Config) -> list[str]:
    """Our paths, in a layer, of the projections that a LoRA config is at."""
    own = [ATTENTION[key] for key in ATTENTION if config["selfattn_lora"] and key in config["attn_matrices"]]
    return own + [place for flag, place in LORA_PLACES.items() if config[flag]]


def _gate(key: str, path: tuple[str, ...], d: int) -> dict[str, Slot]:
    return {
        f"{key}.weight": Slot((*path, "gate", "kernel"), (1, d)),
        f"{key}.bias": Slot((*path, "gate", "bias"), (1,)),
    }


def _bottleneck_slots(config: Config, key: str, path: str, d: int) -> dict[str, Slot]:
    b = bottleneck_size(config["reduction_factor"], d)
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


def bottleneck_size(factor: float, d: int) -> int:
    """The bottleneck that `adapters` computes from a reduction factor at hidden size d.

    Raises:
      UserError: if it would be larger than any that can be built.
    """
    size = d // factor
    if not size <= LARGEST:
        raise UserError(f"{CONFIG}: reduction_factor {factor!r:.40} gives no bottleneck at hidden size {d}")
    return max(1, int(size))


def reduction_factor(d: int, size: int) -> int | float:
    """The reduction factor from which `adapters` computes this bottleneck, max(1, int(d // factor))."""
    if d % size == 0:
        return d // size
    factor = d / size
    while int(d // factor) < size:  # where rounding made the quotient too small
        factor = math.nextafter(factor, 0)
    return factor


def head_modules(config: BertConfig, layers: int = 1) -> tuple[str, ...]:
    """Our paths of the head's layers: of RoBERTa's two, of BERT's one, or two with a pooler of its own."""
    if config.model_type == "roberta":
        return "classifier/dense", "classifier/out_proj"
    return ("pooler", "classifier") if layers == 2 else ("classifier",)


def flexible(layers: int) -> dict[str, Any]:
    """The config of a flexible head that computes what one with so many layers does here."""
    own = {"head_type": "classification", "layers": layers, "use_pooler": layers == 1, "bias": True}
    return own if layers == 1 else {**own, "activation_function": "tanh"}


def head_slots(config: BertConfig, names: Mapping[str, str]) -> dict[str, Slot]:
    """The head's tensors, by {our module: the name there}."""
    slots: dict[str, Slot] = {}
    for module, key in names.items():
        out = config.hidden_size if module.endswith(("dense", "pooler")) else config.num_labels
        slots[f"{key}.weight"] = Slot((*module.split("/"), "kernel"), (out, config.hidden_size))
        slots[f"{key}.bias"] = Slot((*module.split("/"), "bias"), (out,))
    return slots


def check_union(parts: Sequence[Part], config: BertConfig) -> None:
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
            kind = kind_of(one.config)
            if kind != kind_of(other.config):
                continue
            if kind == "prefix_tuning":
                raise UserError(f"adapters has room for one prefix, of one length and with one MLP: {INSTEAD}")
            if kind == "lora":  # it asks for the one of all layers
                raise UserError(
                    f"adapters has room for one LoRA or (IA)3, of one size and in one set of places: {INSTEAD}"
                )
            everywhere = len(one.layers) == len(other.layers) == config.num_hidden_layers
            if everywhere and any(one.config[flag] == other.config[flag] for flag in ADAPTER_PLACES):
                raise UserError(f"adapters has room for one {kind} config in all layers, and there are two: {INSTEAD}")


def _places(config: Config) -> list[str]:
    kind = kind_of(config)
    flags = {"bottleneck": ADAPTER_PLACES, "lora": ("selfattn_lora", *LORA_PLACES)}.get(kind)
    return [kind] if flags is None else [flag for flag in flags if config[flag]]
