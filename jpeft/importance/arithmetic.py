"""Arithmetic with models that were trained from one start: what each task added is scaled, thinned and added up.

A task vector is a model less the start (Ilharco et al. 2023, arXiv:2212.04089). TIES (Yadav et al. 2023,
arXiv:2306.01708, reference prateeky2806/ties-merging) keeps the largest entries of each and, entry by entry, averages
those of the sign that prevails. DARE (Yu et al. 2024, arXiv:2311.03099, reference yule-BUAA/MergeLM) drops entries at
random and scales up the rest, before either of the others.

Models are pytrees: parameters, among them those that `jpeft.merge` gives, or leaves of one transform. Of leaves, the
start is what `jpeft.init` gave, and all must come from one key: factors of LoRA from different keys do not add up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError

__all__ = ["dare", "task_arithmetic", "ties"]


def task_arithmetic(start: Any, models: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
    """Adds weighted task vectors to the start.

    Args:
      start: what all models were trained from.
      models: pytrees of the structure, shapes and dtypes of `start`.
      weights: of each task vector. Below 0 unlearns it. None means one over their number: the plain average.

    Returns:
      A pytree like `start`. Leaves that are not floats, such as indices, are its own.

    Raises:
      UserError: if there are no models, one is not like the start or not finite, leaves that are not floats differ, or
        the number of weights does.
    """
    weights = _weights(models, weights)
    vectors = [_vector(start, model, f"model {i}") for i, model in enumerate(models)]
    return _moved(start, lambda *parts: sum(w * x for w, x in zip(weights, parts, strict=True)), *vectors)


def ties(start: Any, models: Sequence[Any], density: float = 0.2, scale: float = 1.0) -> Any:
    """Adds the mean of those entries of the task vectors that agree in sign, after each lost its smallest entries.

    The sign that prevails at an entry is that of the sum over the tasks; the mean is over the tasks that kept the entry
    and have this sign.

    Args:
      start: what all models were trained from.
      models: pytrees of the structure, shapes and dtypes of `start`.
      density: the share of a task vector's entries that is kept, the largest ones of the whole vector.
      scale: what the mean is multiplied by.

    Returns:
      A pytree like `start`.

    Raises:
      UserError: as `task_arithmetic`, or if `density` is not above 0 and at most 1, or `scale` is not finite.
    """
    _check_density(density)
    if not math.isfinite(scale):
        raise UserError(f"scale must be a finite number, got {scale}")
    _weights(models, None)
    vectors = [_trimmed(_vector(start, model, f"model {i}"), density) for i, model in enumerate(models)]

    def agreed(*parts: np.ndarray) -> np.ndarray:
        stacked = np.stack(parts)
        agree = (np.sign(stacked) == np.sign(stacked.sum(0))) & (stacked != 0)
        return scale * np.where(agree, stacked, 0).sum(0) / np.maximum(agree.sum(0), 1)

    return _moved(start, agreed, *vectors)


def dare(key: Array, start: Any, model: Any, density: float = 0.1) -> Any:
    """Drops entries of a task vector at random and divides the rest by `density`, so that it stays the same on average.

    Args:
      key: decides which entries.
      start: what the model was trained from.
      model: a pytree of the structure, shapes and dtypes of `start`.
      density: the probability that an entry is kept.

    Returns:
      A pytree like `start`, to be given to `task_arithmetic` or `ties` in the place of the model.

    Raises:
      UserError: as `task_arithmetic`, or if `density` is not above 0 and at most 1.
    """
    _check_density(density)
    drawn = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    vector = _vector(start, model, "the model")
    return _moved(start, lambda x: np.where(drawn.random(x.shape, np.float32) < density, x / density, 0), vector)


def _weights(models: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if not len(models):
        raise UserError("expected at least one model, got none")
    found = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(found) != len(models) or not all(map(math.isfinite, found)):
        raise UserError(f"expected a finite weight for each of {len(models)} models, got {found}")
    return found


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {density}")


def _vector(start: Any, model: Any, name: str) -> Any:
    """Model less start in float32; zeros for leaves that are not floats."""
    if jax.tree.structure(start) != jax.tree.structure(model):
        raise UserError(f"{name} has other leaves than the start: expected both of one method, or both merged")

    def less(path: tuple[Any, ...], a: Any, b: Any) -> np.ndarray:
        where = f"{name}, {jax.tree_util.keystr(path, simple=True, separator='/')}"
        if (np.shape(a), jnp.result_type(a)) != (np.shape(b), jnp.result_type(b)):
            raise UserError(f"{where}: expected {np.shape(a)} of {jnp.result_type(a)}, got {np.shape(b)} of "
                            f"{jnp.result_type(b)}")  # fmt: skip
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            if not np.array_equal(a, b):
                raise UserError(f"{where}: {jnp.result_type(a)} leaves must be those of the start")
            return np.zeros(np.shape(a), np.float32)
        added = np.asarray(b, np.float32) - np.asarray(a, np.float32)
        if not np.isfinite(added).all():
            raise UserError(f"{where} is not finite")
        return added

    return jax.tree_util.tree_map_with_path(less, start, model)


def _trimmed(vector: Any, density: float) -> Any:
    """The largest entries of a whole task vector, 0 in the place of the others."""
    sizes = np.concatenate([np.abs(x).ravel() for x in jax.tree.leaves(vector)])
    kept = math.ceil(density * sizes.size)
    least = np.partition(sizes, sizes.size - kept)[sizes.size - kept]
    return jax.tree.map(lambda x: np.where(np.abs(x) >= least, x, 0), vector)


def _moved(start: Any, by: Callable[..., Any], *vectors: Any) -> Any:
    def move(a: Any, *parts: np.ndarray) -> Any:
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            return a
        return jnp.asarray(np.asarray(a, np.float32) + by(*parts), jnp.result_type(a))

    return jax.tree.map(move, start, *vectors)
