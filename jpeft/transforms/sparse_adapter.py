"""SparseAdapter: adapters pruned before training (He et al. 2022, arXiv:2210.04284; reference: Shwai-He/SparseAdapter).

Only the remaining entries are stored and trained: a kernel is {"values": [k], "fixed": {"index": int32 [k]}}, where
`index` refers to the flattened kernel. The values are written into zeros [d, b] inside the forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.site import Site, Sites
from jpeft.core.transform import FIXED, STACKED, Call, Context, Leaves, Params, Setting, Transform, site_key
from jpeft.importance.masks import top
from jpeft.transforms.houlsby import houlsby
from jpeft.transforms.parts.linear import counts
from jpeft.transforms.pfeiffer import pfeiffer

__all__ = ["grasp", "magnitude", "snip", "sparse_adapter", "synflow"]

KINDS = {"houlsby": (houlsby, "swish"), "pfeiffer": (pfeiffer, "relu")}
SCORES = ("random", "magnitude", "synflow", "snip", "grasp")
HALVES = ("down", "up")

Kernels = dict[str, dict[str, Any]]  # {site path: {"down": [d, b], "up": [b, d]}}
Loss = Callable[..., Array]  # (kernels, example, *rest) -> scalar


def sparse_adapter(
    density: float = 0.5,
    score: str = "magnitude",
    kind: str = "pfeiffer",
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str | None = None,
    num_examples: int = 64,
    layers: Sequence[int] | None = None,
    targets: str | None = None,
) -> Transform:
    """Houlsby or Pfeiffer adapters with int(density * all) of their kernels' entries, those with the highest scores.

    Scores are compared over all kernels together. "random", "magnitude" |w| and "synflow" need no data, so `init`
    prunes with them. "snip" and "grasp" are computed from training examples before training; until then the entries
    with the largest magnitude are used. All biases are kept.

    For the paper's Large-Sparse, use k times the bottleneck at density / k: the number of entries stays the same.

    Inference costs as much as the dense adapter, 4 d b floating-point operations per token, since kernels are written
    out as dense ones. An entry is stored as a value and its index, 8 bytes.

    Args:
      density: fraction of the kernels' entries to keep.
      score: "random", "magnitude", "synflow", "snip" or "grasp".
      kind: "pfeiffer" or "houlsby". (Scores of a parallel adapter would all be 0, as its `up` is.)
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`; None means the default of `kind`.
      num_examples: the number of examples for SNIP and GraSP.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual), see `jpeft.find`; None means the default of `kind`.

    Returns:
      A transform with leaves {path: {"down": {"kernel": as above, "bias": [b]}, "up": {"kernel": ..., "bias": [d]}}}.

    Raises:
      UserError: if an option is out of range; in `init`, if a target is missing.
    """
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {density}")
    for name, value, known in (("score", score, SCORES), ("kind", kind, KINDS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown: {nearest(value, known)}")
    counts(num_examples=num_examples)
    make, default = KINDS[kind]
    options: dict[str, Any] = {} if targets is None else {"targets": targets}
    dense = make(bottleneck, reduction_factor, activation or default, layers, **options)
    assert dense.wrap is not None
    dense_wrap = dense.wrap

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        leaves = dense.init(key, sites, params)
        for path, own in leaves.items():
            if STACKED in own:
                raise UserError(f"the parameters of site {path!r} are stacked, which sparse_adapter does not support")
        kernels = _kernels(leaves)
        if score == "random":
            scores = _random(site_key(key, "scores"), kernels)
        else:
            scores = synflow(kernels) if score == "synflow" else magnitude(kernels)
        return _pruned(leaves, scores, density)

    def prepare(setting: Setting) -> Leaves:
        leaves = dense.init(setting.key, setting.sites, setting.variables["params"])

        def loss(kernels: Kernels, example: Any, variables: Any, leaves: Leaves) -> Array:
            peft = {**variables["peft"], setting.instance: _with(leaves, kernels)}
            return setting.loss({**variables, "peft": peft}, example)

        measure = snip if score == "snip" else grasp
        scores = measure(loss, _kernels(leaves), setting.sample(num_examples), setting.variables, leaves)
        return _pruned(leaves, scores, density)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        b, d = (leaves[half]["bias"].shape[0] for half in HALVES)
        full = {"down": _written(leaves["down"], (d, b)), "up": _written(leaves["up"], (b, d))}
        return dense_wrap(full, site, call, args, ctx)

    def decay(path: tuple[str, ...], leaf: Any) -> bool:
        del leaf  # a pruned kernel is one-dimensional
        return "kernel" in path

    return Transform("sparse_adapter", init, wrap, prepare=prepare if score in ("snip", "grasp") else None, decay=decay)


def magnitude(kernels: Kernels) -> Kernels:
    """|w| of every entry."""
    return jax.tree.map(jnp.abs, kernels)


def synflow(kernels: Kernels) -> Kernels:
    """The part of an adapter's flow that passes through an entry (Tanaka et al. 2020, arXiv:2006.05467).

    Ones are sent through an adapter's two kernels with signs, biases and activation removed; the flow is the sum of
    the output, sum_ijk |down_ij| |up_jk|. The score |w| d flow / d|w| is |down_ij| sum_k |up_jk| for an entry of
    `down`, and |up_jk| sum_i |down_ij| for one of `up`. The encoder between adapters, which is neither linear nor
    pruned, is ignored. The reference also scores each adapter separately, and in one pass.
    """

    def one(own: Mapping[str, Array]) -> dict[str, Array]:
        down, up = jnp.abs(own["down"]), jnp.abs(own["up"])
        return {"down": down * up.sum(1)[None], "up": up * down.sum(0)[:, None]}

    return {path: one(own) for path, own in kernels.items()}


def snip(loss: Loss, kernels: Kernels, examples: Any, *rest: Any) -> Kernels:
    """|dL/dm| = |w dL/dw| at m = 1, for masks m on the entries and the mean loss L (Lee et al. 2018, arXiv:1810.02340).

    The sum over examples comes before the absolute value, so contributions of different signs cancel.

    Args:
      loss: (kernels, example, *rest) -> scalar.
      kernels: any pytree of float arrays.
      examples: a pytree of arrays with a common leading axis.
      *rest: further arguments of `loss`.

    Returns:
      A pytree like `kernels`; the higher the score, the more the entry matters.
    """
    grads = _mean(jax.grad(loss), kernels, examples, *rest)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), kernels, grads)


def grasp(loss: Loss, kernels: Kernels, examples: Any, *rest: Any) -> Kernels:
    """w (H g) with the gradient g and the Hessian H of the mean loss (Wang et al. 2020, arXiv:2002.07376).

    Removing an entry changes |g|^2 by -2 w (H g) to first order. So the highest scores are kept: removing these entries
    would reduce the gradient flow most. H g is the derivative of the gradient in direction g; H is never computed.

    Args:
      loss: (kernels, example, *rest) -> scalar.
      kernels: any pytree of float arrays.
      examples: a pytree of arrays with a common leading axis.
      *rest: further arguments of `loss`.

    Returns:
      A pytree like `kernels`, signed.
    """
    g = _mean(jax.grad(loss), kernels, examples, *rest)

    def product(kernels: Kernels, example: Any, g: Kernels, *rest: Any) -> Kernels:
        return jax.jvp(lambda k: jax.grad(loss)(k, example, *rest), (kernels,), (g,))[1]

    return jax.tree.map(jnp.multiply, kernels, _mean(product, kernels, examples, g, *rest))


def _mean(fn: Callable[..., Kernels], kernels: Kernels, examples: Any, *rest: Any) -> Kernels:
    """The mean of fn(kernels, example, *rest) over the examples, one at a time."""

    @jax.jit
    def total(kernels: Kernels, examples: Any, rest: tuple) -> Kernels:
        def add(sums: Kernels, example: Any) -> tuple[Kernels, None]:
            return jax.tree.map(jnp.add, sums, fn(kernels, example, *rest)), None

        n = len(jax.tree.leaves(examples)[0])
        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, kernels), examples)
        return jax.tree.map(lambda x: x / n, sums)

    return total(kernels, jax.tree.map(jnp.asarray, examples), rest)


def _random(key: Array, kernels: Kernels) -> Kernels:
    leaves, treedef = jax.tree.flatten(kernels)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def _kernels(leaves: Leaves) -> Kernels:
    return {path: {half: own[half]["kernel"] for half in HALVES} for path, own in leaves.items()}


def _with(leaves: Leaves, kernels: Kernels) -> Leaves:
    """Leaves with other kernels, dense or pruned."""
    return {
        path: {half: {**own[half], "kernel": kernels[path][half]} for half in HALVES} for path, own in leaves.items()
    }


def _pruned(leaves: Leaves, scores: Kernels, density: float) -> Leaves:
    """The leaves with the best int(density * all) entries of their kernels, over all kernels together.

    The number of entries per kernel determines the shapes of the leaves, so this cannot be traced.
    """
    kernels = _kernels(leaves)
    if not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(scores)):
        raise UserError("a score of sparse_adapter is not finite: look for NaN or Inf in the loss")
    flat = {(path, half): np.asarray(own[half]) for path, own in scores.items() for half in HALVES}
    kept = top(flat, max(1, int(density * sum(x.size for x in flat.values()))))

    def entries(path: str, half: str) -> Leaves:
        index = kept[path, half]
        return {"values": kernels[path][half].reshape(-1)[index], FIXED: {"index": jnp.asarray(index)}}

    return _with(leaves, {path: {half: entries(path, half) for half in HALVES} for path in leaves})


def _written(leaves: Leaves, shape: tuple[int, int]) -> Leaves:
    """{"kernel": [n, m], "bias": [m]} from pruned leaves; dense leaves, used to compute scores, are unchanged."""
    kernel = leaves["kernel"]
    if not isinstance(kernel, Mapping):
        return leaves
    flat = jnp.zeros(shape[0] * shape[1], kernel["values"].dtype)
    flat = flat.at[kernel[FIXED]["index"]].set(kernel["values"], indices_are_sorted=True, unique_indices=True)
    return {**leaves, "kernel": flat.reshape(shape)}
