"""Reads the `config.json` of a Hugging Face model, and checks that it describes an encoder that can exist."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jpeft.core.errors import UserError, nearest
from jpeft.core.files import read_json
from jpeft.core.schema import in_words, is_a
from jpeft.models.bert import ACTIVATIONS, BertConfig

__all__ = ["check_sizes", "read"]

_OURS = ("model_type", "num_labels", "dtype", "remat", "by_token")  # fields that are not simply copied from config.json
# Hugging Face's class defaults where they differ from BertConfig's: a config.json may leave out any field.
_DEFAULTS = {"bert": {}, "roberta": {"vocab_size": 50265, "pad_token_id": 1}}
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "num_labels",
)  # fmt: skip
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def read(folder: Path, num_labels: int, overrides: Mapping[str, Any]) -> BertConfig:
    """Reads the config of a folder, with our own fields set.

    Raises:
      UserError: if the file is missing, describes another kind of model, or has a value that cannot be.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no config.json; expected a Hugging Face model's folder")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected an object, got {type(raw).__name__}")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{file}: model_type {kind!r} is not supported; {nearest(str(kind), _DEFAULTS)}")
    if (positions := raw.get("position_embedding_type")) not in (None, "absolute"):
        raise UserError(f"position_embedding_type {positions!r} is not supported; expected 'absolute'")
    if raw.get("is_decoder") or raw.get("add_cross_attention"):
        raise UserError(f"{str(folder)!r} is a decoder (is_decoder or add_cross_attention); expected an encoder")
    fields = {field.name for field in dataclasses.fields(BertConfig)}
    for name in overrides:
        if name not in fields:
            raise UserError(f"unknown config field {name!r}; {nearest(name, sorted(fields))}")
    stored = {k: raw[k] for k in fields.difference(_OURS) if raw.get(k) is not None}
    given = {**_DEFAULTS[kind], **stored, "model_type": kind, "num_labels": num_labels, **overrides}
    try:
        return _checked(BertConfig(**given))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _checked(config: BertConfig) -> BertConfig:
    for name, hint in get_type_hints(BertConfig).items():
        value, kinds = getattr(config, name), get_args(hint) or (hint,)
        if not any(is_a(value, kind) for kind in kinds):
            raise UserError(f"{name} must be {in_words(kinds[0])}, got {value!r:.60}")
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in _DROPOUTS:
        if not 0 <= (getattr(config, name) or 0) < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {getattr(config, name)}")
    for name in ("layer_norm_eps", "initializer_range"):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be above 0, got {getattr(config, name)}")
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(f"pad_token_id must be from 0 to vocab_size - 1, got {config.pad_token_id}")
    if config.max_length < 1:
        raise UserError(f"max_position_embeddings {config.max_position_embeddings} leaves no room for any token")
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {config.hidden_act!r} is not supported; {nearest(config.hidden_act, ACTIVATIONS)}")
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {config.dtype!r} is not supported; {nearest(config.dtype, ('float32', 'bfloat16'))}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size={config.hidden_size} must be divisible by num_attention_heads={config.num_attention_heads}"
        )
    return config


def check_sizes(config: BertConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the sizes that `config.json` states with the stored tensors, before anything of these sizes is made.

    Args:
      config: as read.
      shapes: of the stored tensors, by Hugging Face's names without the prefix.

    Raises:
      UserError: if a size differs; the message names the field.
    """
    word, position, kind, ffn = (
        shapes.get(name, ())
        for name in (
            "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
            "embeddings.token_type_embeddings.weight", "encoder.layer.0.intermediate.dense.weight",
        )
    )  # fmt: skip
    layers = [int(match[1]) for name in shapes if (match := re.match(r"encoder\.layer\.([0-9]{1,9})\.", name))]
    stored = {"num_hidden_layers": max(layers, default=-1) + 1}
    if len(word) == 2:
        stored |= {"vocab_size": word[0], "hidden_size": word[1]}
    for name, shape in (("max_position_embeddings", position), ("type_vocab_size", kind), ("intermediate_size", ffn)):
        if len(shape) == 2:
            stored[name] = shape[0]
    for name, size in stored.items():
        if getattr(config, name) != size:
            stated = getattr(config, name)
            default = " (or nothing, which means the same)" if stated == getattr(BertConfig, name) else ""
            raise UserError(f"config.json says {name} {stated}{default}, but the weights have {size}")
