"""Masks of single entries: the top k of a pytree, an optax wrapper that trains only those, and compact mask files.

A mask is a pytree like the one that it selects from. Each leaf is True, all of it trains; False, none of it trains; or
int32 [k], ascending, the entries of the flattened leaf that train.

    scores = jpeft.fisher(loss, params, examples)
    mask = jpeft.top(scores, k=1000)
    optimizer = jpeft.packed(optax.adamw(1e-4), mask)  # Adam's two moments have 1000 entries each
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.files import read_tensors, write_leaves

__all__ = ["magnitude", "pack", "packed", "random", "read_mask", "top", "write_mask"]

MODEL = "model"  # the metadata entry that names the model of a mask


def top(scores: Any, k: int) -> Any:
    """The mask of the k largest scores over all leaves together.

    Computed on the host, in NumPy, by selection: the scores are not sorted.

    Args:
      scores: a pytree of float arrays, without NaN.
      k: the number of entries, from 0 to all. Ties go to the earlier entry, in the order of the leaves and then of the
        flattened leaf.

    Returns:
      A pytree like `scores` with int32 arrays of sorted flat indices, empty where nothing is selected.

    Raises:
      UserError: if k is out of range or not an integer, a score is NaN or complex, or a leaf has 2^31 entries or more.

    >>> import jax.numpy as jnp
    >>> mask = top({"a": jnp.array([[3.0, 1.0], [4.0, 1.0]]), "b": jnp.array([5.0, 1.0])}, k=4)
    >>> {name: index.tolist() for name, index in mask.items()}
    {'a': [0, 1, 2], 'b': [0]}
    """
    leaves, treedef = jax.tree.flatten(scores)
    _check_budget(k, [math.prod(x.shape) for x in leaves])
    leaves = [np.asarray(x) for x in leaves]
    if any(np.iscomplexobj(x) for x in leaves):
        raise UserError("the scores are complex, which have no order: expected real numbers")
    if any(np.isnan(x).any() for x in leaves):
        raise UserError("the scores contain NaN")
    if k == 0:
        return treedef.unflatten([np.zeros(0, np.int32) for _ in leaves])
    wide = any(x.dtype == np.float64 for x in leaves)  # bits are compared, so all leaves need the same dtype
    orders = [_order(x.ravel().astype(np.float64 if wide else np.float32)) for x in leaves]
    limit = np.partition(np.concatenate(orders), -k)[-k]
    ties = k - sum(int((order > limit).sum()) for order in orders)  # how many of the ties for k-th largest to take
    chosen = []
    for order in orders:
        equal = np.flatnonzero(order == limit)[:ties]
        ties -= equal.size
        chosen.append(np.sort(np.concatenate([np.flatnonzero(order > limit), equal])).astype(np.int32))
    return treedef.unflatten(chosen)


def magnitude(values: Any, k: int) -> Any:
    """The mask of the k entries that are largest in absolute value: a control that uses no data.

    Args:
      values: a pytree of float arrays.
      k: as in `top`.

    Returns:
      A mask, as from `top`.

    Raises:
      UserError: as `top`.
    """
    return top(jax.tree.map(lambda x: np.abs(np.asarray(x)), values), k)


def random(key: Array, like: Any, k: int) -> Any:
    """The mask of k random entries: the control of Sung et al. 2021, arXiv:2111.09839.

    Args:
      key: a PRNG key.
      like: a pytree of arrays, or of their shapes.
      k: as in `top`.

    Returns:
      A mask, as from `top`.

    Raises:
      UserError: if k is out of range or not an integer, or a leaf has 2^31 entries or more.
    """
    leaves, treedef = jax.tree.flatten(like)
    sizes = [math.prod(x.shape) for x in leaves]
    _check_budget(k, sizes)
    # The number of entries per leaf determines shapes, so this cannot be traced.
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    drawn = np.sort(rng.choice(sum(sizes), k, replace=False, shuffle=False)) if k else np.zeros(0, np.int64)
    if not leaves:
        return like
    ends = np.cumsum(sizes)
    parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return treedef.unflatten([(p - e + n).astype(np.int32) for p, e, n in zip(parts, ends, sizes, strict=True)])


def pack(mask: Any, values: Any) -> list[Array]:
    """The selected entries, one array per leaf: [k], the leaf itself where the mask is True, [0] where it is False."""
    return [_pack(m, x) for m, x in zip(jax.tree.leaves(mask), jax.tree.leaves(values), strict=True)]


def packed(inner: optax.GradientTransformation, mask: Any) -> optax.GradientTransformationExtraArgs:
    """Runs an optimiser on the selected entries only.

    Gradients and parameters are packed into one vector per leaf, `inner` updates these, and its updates are scattered.
    So its state has their size, and weight decay, clipping by the global norm and schedules see nothing else. Entries
    that are not selected stay bit-identical: their update is -0.0, which leaves every number unchanged, including 0.0.
    Fully selected leaves keep their shape and cost nothing extra; leaves without selected entries cost nothing.

    Args:
      inner: any optax optimiser. If it depends on shapes, as Adafactor does, it sees vectors.
      mask: a mask as described above. It must be concrete, not traced.

    Returns:
      An optimiser for the whole pytree.

    Raises:
      UserError: if a leaf of the mask is invalid or, when the optimiser is used, if it does not fit the parameters.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([1.0])}
    >>> optimizer = packed(optax.sgd(0.5), {"w": jnp.array([1, 2]), "b": False})
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[1.0, 1.0], [1.5, 4.0]]
    """
    mask = jax.tree_util.tree_map_with_path(_selection, mask)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> optax.OptState:
        _check_fits(mask, params)
        return inner.init(pack(mask, params))

    def update(updates: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        own = None if params is None else pack(mask, params)
        small: Any
        small, state = inner.update(pack(mask, updates), state, own, **extra)
        leaves, treedef = jax.tree.flatten(updates)
        found = [_unpack(m, s, x) for m, s, x in zip(jax.tree.leaves(mask), small, leaves, strict=True)]
        return treedef.unflatten(found), state

    return optax.GradientTransformationExtraArgs(init, update)


def write_mask(path: Path, mask: Any, model: str) -> None:
    """Writes a mask of a nested dict: only the indices, 4 bytes per entry.

    Args:
      path: the safetensors file; its folder is created if needed, and an existing file is replaced atomically.
      mask: a mask as described above; leaves without selected entries are not written.
      model: an identifier of the model, such as the `jpeft.models.pretrained.fingerprint` of its parameters.

    Raises:
      UserError: if a leaf of the mask is invalid.
    """
    if not isinstance(mask, dict):
        raise UserError(f"expected a mask of a nested dict, got {type(mask).__name__}")
    mask = jax.tree_util.tree_map_with_path(_selection, mask)
    kept = {name: np.asarray(m) for name, m in tree.flatten(mask).items() if m is not False and np.size(m)}
    write_leaves(path, tree.unflatten(kept), {MODEL: model})


def read_mask(path: Path, params: Any, model: str) -> Any:
    """Reads a mask.

    Args:
      path: the file to read.
      params: the nested dict that the mask selects from.
      model: the identifier that the mask must have been written with.

    Returns:
      A mask like `params`.

    Raises:
      UserError: if it is for another model, is not a mask, or was damaged.
    """
    found, about = read_tensors(path)
    if about.get(MODEL) != model:
        raise UserError(f"mask {path} was made for another model: {about.get(MODEL)}, not {model}")
    mask = jax.tree_util.tree_map_with_path(
        lambda at, _: _selection(at, found.pop(jax.tree_util.keystr(at, simple=True, separator=":"), False)), params
    )
    if found:
        raise UserError(f"mask {path} selects from {next(iter(found))}, which the model does not have")
    _check_fits(mask, params)
    return mask


def _check_budget(k: int, sizes: list[int]) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 0 <= k <= sum(sizes):
        raise UserError(f"k must be an integer from 0 to {sum(sizes):,}, the number of entries, got {k!r}")
    if max(sizes, default=0) >= 2**31:
        raise UserError(f"a leaf has {max(sizes):,} entries, but masks support at most {2**31 - 1:,}")


def _selection(path: Any, m: Any) -> bool | np.ndarray:
    """A leaf of a mask as True, False or int32 indices."""
    m = np.asarray(m)
    if m.shape == () and m.dtype == bool:
        return bool(m)
    if m.size == 0:
        return np.zeros(0, np.int32)
    if m.ndim != 1 or m.dtype.kind not in "iu" or int(m[0]) < 0 or (m[1:] <= m[:-1]).any() or int(m[-1]) >= 2**31:
        raise UserError(
            f"the mask of {jax.tree_util.keystr(path) or 'the leaf'} must be True, False or ascending indices without "
            f"repeats, got {m.dtype} {list(m.shape)}"
        )
    return m.astype(np.int32)


def _order(x: np.ndarray) -> np.ndarray:
    """Integers ordered like the floats: their bits, with all but the sign bit inverted for negative numbers.

    Both zeros map to 0, and so do subnormal numbers, as in most of XLA's arithmetic.
    """
    kind = np.int64 if x.dtype == np.float64 else np.int32
    bits, exponent = x.view(kind), np.array(np.inf, x.dtype).view(kind)
    return np.where(bits & exponent == 0, kind(0), np.where(bits < 0, bits ^ np.iinfo(kind).max, bits))


def _pack(m: Any, x: Any) -> Array:
    if isinstance(m, bool):
        return jnp.asarray(x) if m else jnp.zeros(0, x.dtype)
    return jnp.asarray(x).reshape(-1).at[m].get(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")


def _unpack(m: Any, small: Array, x: Any) -> Array:
    if m is True:
        return small
    none = jnp.full(x.shape, -0.0, small.dtype)
    if m is False:
        return none
    flat = none.reshape(-1).at[m].set(small, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
    return flat.reshape(x.shape)


def _check_fits(mask: Any, params: Any) -> None:
    have, given = jax.tree.structure(params), jax.tree.structure(mask)
    if have != given:
        raise UserError(f"the mask does not fit the parameters: it is for {given}, they are {have}")
    for (path, m), x in zip(jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(params), strict=True):
        if not isinstance(m, bool) and m.size and m[-1] >= x.size:
            where = jax.tree_util.keystr(path)
            raise UserError(f"the mask of {where} goes up to {m[-1]:,}, but it has {x.size:,} entries")
