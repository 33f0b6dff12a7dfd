"""Renames between Hugging Face's tensors and our parameters; pure functions of arrays, no files.

    Hugging Face (kernels are [out, in])               here (kernels are [in, out])
    [bert.]encoder.layer.3.attention.self.query.weight  encoder/layer_3/attention/query/kernel
    [bert.]encoder.layer.3.output.LayerNorm.bias        encoder/layer_3/ffn_add_norm/LayerNorm/bias
    classifier.weight                                   classifier/kernel

Reading is strict: except for an absent head or pooler, a surplus, missing or misshapen tensor is an error.
"""

import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jpeft.core.errors import UserError
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.hf_config import check_sizes

__all__ = ["fingerprint", "from_hf", "hf_module", "listed", "shapes", "to_hf"]

_FRESH = ("classifier", "pooler")  # the groups that a checkpoint may lack
_IGNORED = r"embeddings\.(position_ids|token_type_ids)|(cls|lm_head|qa_outputs)\..*"  # buffers and other tasks' heads

_MODULES = (  # the first pattern that matches a whole path wins
    (r"encoder/layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2"),
    (r"encoder/layer_(\d+)/attention/output", r"encoder.layer.\1.attention.output.dense"),
    (r"encoder/layer_(\d+)/attention_add_norm/LayerNorm", r"encoder.layer.\1.attention.output.LayerNorm"),
    (r"encoder/layer_(\d+)/ffn/intermediate", r"encoder.layer.\1.intermediate.dense"),
    (r"encoder/layer_(\d+)/ffn/output", r"encoder.layer.\1.output.dense"),
    (r"encoder/layer_(\d+)/ffn_add_norm/LayerNorm", r"encoder.layer.\1.output.LayerNorm"),
    (r"embeddings/(\w+)", r"embeddings.\1"),
    (r"pooler", r"pooler.dense"),
    (r"classifier(?:/(dense|out_proj))?", r"classifier.\1"),
)
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def hf_module(path: str, model_type: str = "") -> str:
    """Returns Hugging Face's name of one of our modules.

    Args:
      path: a site's path.
      model_type: "bert" or "roberta", the prefix of everything but the head; "" gives the bare name.

    Raises:
      UserError: there is no such module.

    >>> hf_module("encoder/layer_3/attention/query", "bert")
    'bert.encoder.layer.3.attention.self.query'
    """
    for pattern, name in _MODULES:
        if match := re.fullmatch(pattern, path):
            bare = match.expand(name).rstrip(".")
            return bare if not model_type or bare.startswith("classifier") else f"{model_type}.{bare}"
    raise UserError(f"{path!r} is not a BERT or RoBERTa module with parameters")


def to_hf(config: BertConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Renames and transposes our parameters to Hugging Face's.

    Args:
      config: the shape of the model.
      params: the `params` tree of `Bert(config)`.

    Returns:
      Contiguous float32 arrays by Hugging Face's names, with the `bert.` or `roberta.` prefix.

    Raises:
      UserError: a parameter is missing, surplus or of the wrong shape.
    """
    flat = _flat(params)
    wanted = shapes(config)
    _check("the params tree", {path: np.shape(x) for path, x in flat.items()}, wanted)
    return {_hf_name(path, config.model_type): _turned(path, flat[path]) for path in wanted}


def from_hf(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Renames and transposes Hugging Face's tensors to our parameters.

    Args:
      config: the shape of the model.
      tensors: by Hugging Face's names, with or without the prefix; any float type.

    Returns:
      The float32 `params` tree, and the groups ("classifier", "pooler") that have no tensors.

    Raises:
      UserError: any other tensor is missing, or a tensor is surplus, of the wrong shape or not of floats.
    """
    pooled = config.model_type == "bert" and not config.by_token  # no other head reads the pooler
    ignored = _IGNORED + ("" if pooled else r"|pooler\..*")
    bare: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        own = _bare(name)
        if own in bare:
            raise UserError(f"the checkpoint has {own} twice, with and without prefix or by its older name")
        if not re.fullmatch(ignored, own):
            bare[own] = x
    stored = {name: tuple(x.shape) for name, x in bare.items()}
    check_sizes(config, stored)
    fresh = tuple(group for group in _FRESH if not any(name.startswith(f"{group}.") for name in bare))
    ours = {path: s for path, s in shapes(config).items() if path.split("/")[0] not in fresh}
    fresh = tuple(group for group in fresh if group != "pooler" or pooled)
    paths = {_hf_name(path): path for path in ours}
    wanted = {name: ours[path][::-1] if path.endswith("kernel") else ours[path] for name, path in paths.items()}
    head = f"classifier{'.out_proj' if config.model_type == 'roberta' and not config.by_token else ''}.weight"
    if head in stored and head in wanted and stored[head] != wanted[head]:
        raise UserError(
            f"the checkpoint's head {head} has shape {list(stored[head])}, but num_labels={config.num_labels} needs "
            f"{list(wanted[head])}; load a checkpoint without a head, or use it for a task with that many labels"
        )
    _check("the checkpoint", stored, wanted)
    if codes := [name for name, x in bare.items() if not jnp.issubdtype(x.dtype, jnp.floating)]:
        raise UserError(f"expected tensors of floats, found {bare[codes[0]].dtype} in {listed(codes)}")
    flat = {path: _turned(path, bare[name]) for name, path in paths.items()}
    if bad := [path for path, x in flat.items() if not np.isfinite(x).all()]:
        raise UserError(f"the checkpoint has numbers that are not finite in {listed(bad)}")
    return unflatten_dict(flat, sep="/"), fresh


def fingerprint(params: Any) -> str:
    """Hashes the names, shapes, types and bytes of a pytree, to detect that a module was trained on another base.

    Args:
      params: any pytree of arrays. Leave out the head: a fresh one differs from seed to seed.

    Returns:
      16 hexadecimal digits, the same on every machine.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(_flat(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {np.shape(leaf)} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


@functools.lru_cache(maxsize=16)  # it traces the whole model
def shapes(config: BertConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter by its path, without computing anything."""
    variables = jax.eval_shape(Bert(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return types.MappingProxyType({path: x.shape for path, x in _flat(variables["params"]).items()})


def _hf_name(path: str, model_type: str = "") -> str:
    module, _, leaf = path.rpartition("/")
    return f"{hf_module(module, model_type)}.{_LEAVES[leaf]}"


def _bare(name: str) -> str:
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _turned(path: str, x: Any) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return np.ascontiguousarray(x.T if path.endswith("kernel") else x)


def _check(what: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    bent = [f"{n} {list(found[n])} instead of {list(s)}" for n, s in wanted.items() if n in found and found[n] != s]
    missing, surplus = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    lists = {"is missing": missing, "has unexpected": surplus, "has wrong shapes:": bent}
    if faults := [f"{fault} {listed(names)}" for fault, names in lists.items() if names]:
        raise UserError(f"{what} does not fit the config: it {'; '.join(faults)}")


def listed(names: Iterable[str], n: int = 4) -> str:
    """The first names and the number of remaining ones, for an error message."""
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
