"""Arithmetic with models that were trained from one start: what each task added is scaled, thinned and added up.

A task vector is a model less the start (Ilharco et al. 2023, arXiv:2212.04089). TIES (Yadav et al. 2023,
arXiv:2306.01708, reference prateeky2806/ties-merging) keeps the largest entries of each and, entry by entry, averages
those of the sign that prevails. DARE (Yu et al. 2024, arXiv:2311.03099, reference yule-BUAA/MergeLM) drops entries at
random and scales up the rest, before either of the others.

Models are pytrees: parameters, among them those that `jpeft.merge` gives, or leaves of one transform. Of leaves, the
start is what `jpeft.init` gave, and all must come from one key: factors of LoRA from different keys do not add up.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError

__all__ = ["check_alike", "dare", "finite", "in_range", "task_arithmetic", "ties"]


def task_arithmetic(start: Any, models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Adds weighted task vectors to the start.

    Args:
      start: what all models were trained from.
      models: pytrees of the structure, shapes and dtypes of `start`.
      weights: of each task vector. Below 0 unlearns it. None means one over their number: the plain average.

    Returns:
      A pytree like `start`. Leaves that are not floats, such as indices, are its own.

    Raises:
      UserError: if there are no models, a model differs from the start in structure, shape or dtype, a model or the
        result is not finite, leaves that are not floats differ, or there are not as many weights as models.
    """
    weights = _weights(models, weights)
    vectors = [_vector(start, model, f"model {i}") for i, model in enumerate(models)]

    def added(*parts: np.ndarray) -> Any:
        return sum(w * x for w, x in zip(weights, parts, strict=True))

    return _moved(start, added, f"weights {weights}", *vectors)


def ties(start: Any, models: Sequence[Any], density: float = 0.2, scale: float = 1.0) -> Any:
    """Trims each task vector to its largest entries, then adds the mean of those that have the prevailing sign.

    The sign that prevails at an entry is that of the sum over the tasks; the mean is over the tasks that kept the entry
    and have this sign.

    Args:
      start: what all models were trained from.
      models: pytrees of the structure, shapes and dtypes of `start`.
      density: the share of a task vector's entries that is kept, the largest ones, counted over the leaves that some
        model changed.
      scale: what the mean is multiplied by.

    Returns:
      A pytree like `start`.

    Raises:
      UserError: as `task_arithmetic`, or if there are no entries, `density` is not above 0 and at most 1, or `scale` is
        not finite.
    """
    _check_density(density)
    if not finite(scale):
        raise UserError(f"scale must be a finite number, got {scale}")
    _weights(models, None)
    whole = [_vector(start, model, f"model {i}") for i, model in enumerate(models)]
    # What no model changed is no part of a task vector: frozen parameters, indices.
    moved = jax.tree.map(lambda *x: any(part.any() for part in x), *whole)
    vectors = [_trimmed(vector, moved, density) for vector in whole]

    def agreed(*parts: np.ndarray) -> np.ndarray:
        stacked = np.stack(parts)
        agree = (np.sign(stacked) == np.sign(stacked.sum(0))) & (stacked != 0)
        return scale * np.where(agree, stacked, 0).sum(0) / np.maximum(agree.sum(0), 1)

    return _moved(start, agreed, f"scale {scale}", *vectors)


def dare(key: Array, start: Any, model: Any, density: float = 0.1) -> Any:
    """Drops entries of a task vector at random and divides the rest by `density`, which keeps its expected value.

    Args:
      key: decides which entries.
      start: what the model was trained from.
      model: a pytree of the structure, shapes and dtypes of `start`.
      density: the probability that an entry is kept.

    Returns:
      A pytree like `start`, to be given to `task_arithmetic` or `ties` in the place of the model.

    Raises:
      UserError: as `task_arithmetic`, or if `density` is not above 0 and at most 1, or `key` is several keys.
    """
    _check_density(density)
    seed = np.asarray(jax.random.key_data(key))
    if seed.ndim != 1:
        raise UserError(f"expected one key, got an array of keys of shape {seed.shape[:-1]}")
    drawn = np.random.default_rng(seed)
    vector = _vector(start, model, "the model")

    def thinned(x: np.ndarray) -> np.ndarray:
        return np.where(drawn.random(x.shape, np.float32) < density, x / density, 0)

    return _moved(start, thinned, f"density {density}", vector)


def check_alike(start: Any, model: Any, name: str, first: str = "the start", dtypes: bool = True) -> None:
    """Checks that two pytrees can be combined.

    Args:
      start: a pytree of arrays.
      model: another one.
      name: of the model, for the message.
      first: of the start, likewise.
      dtypes: whether floats of different dtypes are refused.

    Raises:
      UserError: if their structures, shapes or dtypes differ, leaves that are not floats do, or one is not finite.
    """
    if jax.tree.structure(start) != jax.tree.structure(model):
        raise UserError(f"{name} has other leaves than {first}: expected both of one method, or both merged")

    def check(path: tuple[Any, ...], a: Any, b: Any) -> None:
        at = _at(path)
        (old, new), floats = (jnp.result_type(a), jnp.result_type(b)), _is_float(a) and _is_float(b)
        if np.shape(a) != np.shape(b) or (old != new and (dtypes or not floats)):
            raise UserError(f"{name}, {at}: expected {np.shape(a)} of {old}, got {np.shape(b)} of {new}")
        if not floats and not np.array_equal(a, b):
            raise UserError(f"{name}, {at}: {old} leaves must be those of {first}")
        for whose, x in ((first, a), (name, b)) if floats else ():
            if not np.isfinite(np.asarray(x)).all():
                raise UserError(f"{whose}, {at} is not finite")

    jax.tree_util.tree_map_with_path(check, start, model)


def in_range(path: tuple[Any, ...], wide: np.ndarray, dtype: Any, told: str) -> Array:
    """An array in a dtype; `told` is what it was computed with.

    Raises:
      UserError: if it is not finite there.
    """
    with np.errstate(over="ignore"):
        found = jnp.asarray(wide, dtype)
    if not bool(jnp.isfinite(found).all()):
        raise UserError(f"{_at(path)}, with {told}: the result is not finite in {found.dtype}")
    return found


def finite(x: float) -> bool:
    """Whether a number is finite as a float; an integer may be too large for one."""
    return abs(x) <= sys.float_info.max


def _at(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "the only leaf"


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _weights(models: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if not len(models):
        raise UserError("expected at least one model, got none")
    found = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(found) != len(models) or not all(map(finite, found)):
        raise UserError(f"expected a finite weight for each of {len(models)} models, got {found}")
    return found


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {density}")


def _vector(start: Any, model: Any, name: str) -> Any:
    """Model less start, at least in float32; zeros for leaves that are not floats."""
    check_alike(start, model, name)

    def less(path: tuple[Any, ...], a: Any, b: Any) -> np.ndarray:
        if not _is_float(a):
            return np.zeros(np.shape(a), np.float32)
        with np.errstate(over="ignore"):
            added = np.asarray(b, _wide(a)) - np.asarray(a, _wide(a))
        if not np.isfinite(added).all():
            raise UserError(f"{name}, {_at(path)} is so far from the start that float32 cannot hold the difference")
        return added

    return jax.tree_util.tree_map_with_path(less, start, model)


def _wide(x: Any) -> np.dtype:
    """What sums of a leaf are computed in: float32, or float64 where it is that."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _trimmed(vector: Any, moved: Any, density: float) -> Any:
    """The largest entries of a whole task vector, of the leaves that moved; 0 in the place of the others."""
    leaves = jax.tree.leaves(vector)
    if not sum(x.size for x in leaves):
        raise UserError("expected models with entries to choose from, got none")
    found = [np.abs(x).ravel() for x, some in zip(leaves, jax.tree.leaves(moved), strict=True) if some]
    if not found:
        return vector
    sizes = np.concatenate(found)
    kept = math.ceil(density * sizes.size)
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return jax.tree.map(lambda x: np.where(np.abs(x) >= least, x, 0), vector)


def _moved(start: Any, by: Callable[..., Any], told: str, *vectors: Any) -> Any:
    """The start plus a function of the vectors; `told` is what that depends on, for messages."""

    def move(path: tuple[Any, ...], a: Any, *parts: np.ndarray) -> Any:
        if not _is_float(a):
            return a
        with np.errstate(over="ignore", invalid="ignore"):
            moved = np.asarray(a, _wide(a)) + by(*parts)
        return in_range(path, moved, jnp.result_type(a), told)

    return jax.tree_util.tree_map_with_path(move, start, *vectors)
