"""What the comparisons with the peers share: reading their goldens, and holding ours against them.

A mapping takes a dict of the peer's tensors to our leaves. It only renames, transposes and cuts, so the same mapping
takes the peer's gradients to what ours must be.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import jpeft
from jpeft.core.tree import flatten
from jpeft.models import Bert, pretrained
from jpeft.models.conversion import hf_module

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ARCHITECTURES = ["bert", "roberta"]
LAYERS = range(2)
HIDDEN = 16
LOGITS, GRADS = 2e-5, 1e-4

Tensors = Mapping[str, np.ndarray]


class Golden(NamedTuple):
    """What a peer computed.

    Attributes:
      trained: its trained tensors, by its own names.
      grads: the gradients, by the same names.
      inputs: the model's arguments.
      labels: [b] classes.
      logits: [b, c].
      start: PiSSA's A and B at the start.
    """

    trained: Tensors
    grads: Tensors
    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    logits: np.ndarray
    start: Tensors


class Result(NamedTuple):
    """What we compute: logits [b, c], and the gradients of our leaves and of the head."""

    logits: np.ndarray
    leaves: Any
    head: Any


class Base(NamedTuple):
    """A base model, and what its sites are."""

    architecture: str
    model: Bert
    params: dict[str, Any]
    sites: jpeft.core.site.Sites


def methods(peer: str, architecture: str) -> set[str]:
    """The methods that a peer's golden holds."""
    return set(json.loads((GOLDEN / f"{peer}_{architecture}.json").read_text()))


@functools.cache
def _file(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden(peer: str, architecture: str, method: str) -> Golden:
    """Reads one method's part of a golden file."""

    def part(name: str) -> dict[str, np.ndarray]:
        start = f"{method}/{name}/"
        return {key.removeprefix(start): x for key, x in stored.items() if key.startswith(start)}

    stored = _file(f"{peer}_{architecture}")
    inputs = {name: x.astype(np.int32) for name, x in part("inputs").items()}
    labels = inputs.pop("labels")
    return Golden(part("trained"), part("grads"), inputs, labels, stored[f"{method}/logits"], part("start"))


def load_base(folder: pathlib.Path, architecture: str) -> Base:
    """Loads a base model as a user would: from a folder."""
    for end, name in ((".json", "config.json"), (".safetensors", "model.safetensors")):
        shutil.copyfile(GOLDEN / f"peft_base_{architecture}{end}", folder / name)
    num_labels = {"bert": 3, "roberta": 2}[architecture]
    loaded = pretrained.load(folder, num_labels=num_labels, key=jax.random.key(0))
    assert loaded.fresh == ()
    model = Bert(loaded.config)
    return Base(architecture, model, loaded.params, jpeft.sites(model, jnp.ones((2, 3), int)))


def logits(base: Base, method: Any, leaves: Any, head: Any, inputs: Any, mask: Any = None) -> np.ndarray:
    """Our logits from given leaves, with `mask` for the wraps."""
    variables = {"params": {**base.params, "classifier": head}, "peft": leaves}
    return np.asarray(jpeft.apply(base.model, method, variables, mask=mask, **inputs)[0])


def run(base: Base, method: Any, leaves: Any, head: Any, peer: Golden, inputs: Any, mask: Any) -> Result:
    """Our logits and gradients from given leaves."""
    training, fixed = jpeft.core.partition.split(leaves)

    def loss(training, head):
        variables = {"params": {**base.params, "classifier": head}, "peft": jpeft.core.tree.union(training, fixed)}
        logits, _ = jpeft.apply(base.model, method, variables, mask=mask, **inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, peer.labels).mean(), logits

    # Not compiled as a whole: op by op, what one method compiled serves the next.
    (_, logits), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(training, head)
    return Result(np.asarray(logits), *grads)


def check(
    base: Base,
    method: Any,
    mapping: Callable[[Tensors], Any],
    head_prefix: str,
    peer: Golden,
    inputs: Any = None,
    mask: Any = None,
) -> None:
    """Holds logits, gradients, and the layout of the leaves against a peer's.

    Args:
      base: the base model.
      method: our transform or chain.
      mapping: the peer's tensors to our leaves; "fixed" leaves may come along.
      head_prefix: what the names of the head's tensors start with.
      peer: the golden.
      inputs: other arguments of the model than the peer's.
      mask: for the wraps.
    """
    seen: set[str] = set()
    leaves, head = _mapped(mapping, head_prefix, peer.trained, seen)
    assert seen == set(peer.trained)  # nothing of the peer's is left out
    fresh = jpeft.init(method, jax.random.key(0), base.sites, base.params)
    assert {k: x.shape for k, x in flatten(fresh).items()} == {k: x.shape for k, x in flatten(leaves).items()}
    ours = run(base, method, leaves, head, peer, peer.inputs if inputs is None else inputs, mask)
    np.testing.assert_allclose(ours.logits, peer.logits, rtol=0, atol=LOGITS)
    wanted, wanted_head = _mapped(mapping, head_prefix, peer.grads, set())
    wanted = jpeft.core.partition.split(wanted)[0]
    theirs = flatten({"leaves": wanted, "head": wanted_head})
    grads = flatten({"leaves": ours.leaves, "head": ours.head})
    assert set(grads) == set(theirs)
    largest = max(np.linalg.norm(x) for x in theirs.values())
    assert largest > 1e-3
    for path, x in theirs.items():
        difference = np.linalg.norm(np.asarray(grads[path]) - x)
        assert difference <= GRADS * np.linalg.norm(x) + 1e-12 * largest, (path, difference, np.linalg.norm(x))


def mapped(mapping: Callable[[Tensors], Any], head_prefix: str, peer: Golden) -> tuple[Any, Any]:
    """The leaves and the head, for `logits`."""
    return _mapped(mapping, head_prefix, peer.trained, set())


class _Watched(dict):
    """A dict that notes which of its items were read."""

    def __init__(self, tensors: Tensors, seen: set[str]):
        super().__init__(tensors)
        self._seen = seen

    def __getitem__(self, name: str) -> np.ndarray:
        self._seen.add(name)
        return super().__getitem__(name)


def _mapped(mapping: Callable[[Tensors], Any], head_prefix: str, tensors: Tensors, seen: set[str]) -> tuple[Any, Any]:
    watched = _Watched(tensors, seen)
    leaves = jax.tree.map(np.ascontiguousarray, mapping(watched))
    parts = [name for name in ("dense", "out_proj") if f"{head_prefix}.{name}.bias" in watched]
    if not parts:
        return leaves, linear(watched, head_prefix)
    return leaves, {name: linear(watched, f"{head_prefix}.{name}") for name in parts}


def linear(tensors: Tensors, name: str) -> dict[str, np.ndarray]:
    """PyTorch's Linear."""
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def paths(*names: str) -> list[str]:
    """ "attention/query" in every layer."""
    return [f"encoder/layer_{i}/{name}" for i in LAYERS for name in names]


def module(base: Base, path: str) -> str:
    """A peer's name of one of our modules."""
    return hf_module(path, base.architecture)


def prefix_parts(projection: dict[str, np.ndarray]) -> dict[str, Any]:
    """Cuts the columns K0, V0, K1, V1, ... of a linear layer into one key and one value layer for each of ours."""

    def part(i: int) -> dict[str, np.ndarray]:
        return {name: x[..., i * HIDDEN : (i + 1) * HIDDEN] for name, x in projection.items()}

    return {f"encoder/layer_{i}/attention/core": {"key": part(2 * i), "value": part(2 * i + 1)} for i in LAYERS}


def prefix_flat(rows: np.ndarray) -> dict[str, Any]:
    """Cuts the same columns of the prefix itself [P, L * 2 * d]."""
    parts = prefix_parts({"rows": rows})
    return {path: {name: x["rows"] for name, x in own.items()} for path, own in parts.items()}
