"""Merges models of the same shape: the average of their parameters, weighted by Fisher information.

Matena and Raffel 2022, arXiv:2111.09832. Approximate the posterior of each model by a normal distribution around its
parameters, with the diagonal Fisher information as its precision. The product of the posteriors is then largest at

    theta = sum_k weight_k F_k theta_k / sum_k weight_k F_k

entry by entry. As in the reference (mmatena/model_merging), F_k is divided by its norm over all entries, so that no
model counts more because its gradients are larger. The information of the first model, the target, has a lower bound:
an entry that no model has information about keeps the target's value.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.errors import UserError
from jpeft.importance.arithmetic import check_alike, finite, in_range

__all__ = ["fisher_average"]


def fisher_average(
    models: Sequence[Any],
    fishers: Sequence[Any],
    weights: Sequence[float] | None = None,
    floor: float = 1e-10,
    normalize: bool = True,
) -> Any:
    """Merges models, or modules, that were trained separately from the same start.

    Args:
      models: pytrees of the same structure: parameters, or the leaves of one transform. Leave out what the tasks do not
        share, such as the head. The first one is the target.
      fishers: the Fisher information of each, from `jpeft.fisher` at the trained parameters.
      weights: the weight of each model: above 0 for the target, 0 or more for the others. None means 1 each.
      floor: the lower bound on the target's information, above 0, as a fraction of the norm of that information.
      normalize: whether the information of each model is divided by its norm first.

    Returns:
      A pytree like the models, with the dtypes of the first; computed in float64. Leaves that are not floats, such as
      indices, are its own.

    Raises:
      UserError: if there are no models, their shapes differ, the numbers of models, Fishers and weights differ, a model
        is not finite, leaves that are not floats differ, or the information of a model is all zero, or negative or not
        finite somewhere.
    """
    models, fishers = list(models), list(fishers)
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or not len(models) == len(fishers) == len(weights):
        raise UserError(f"expected a Fisher and a weight per model, got {len(models)} models, {len(fishers)} Fishers "
                        f"and {len(weights)} weights")  # fmt: skip
    if not all(x >= 0 and finite(x) for x in (*weights, floor)) or not weights[0] > 0 or not floor > 0:
        raise UserError(
            f"weights must be 0 or more and finite, the first weight and floor above 0, got weights {weights!r:.100} "
            f"and floor {floor!r:.40}"
        )
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (*models, *fishers)]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError("the models and their Fisher information must all have the same structure and shapes")
    for i, model in enumerate(models):
        check_alike(models[0], model, f"model {i}", "model 0", dtypes=False)
    norms = [_norm(information, i) for i, information in enumerate(fishers)]
    scales = [weight / norm if normalize else weight for weight, norm in zip(weights, norms, strict=True)]
    least = floor * norms[0]

    def merged(path: tuple[Any, ...], *leaves: Any) -> Any:
        own, information = leaves[: len(models)], leaves[len(models) :]
        if not jnp.issubdtype(jnp.result_type(own[0]), jnp.floating):
            return own[0]
        total, weight = np.zeros(np.shape(own[0])), np.zeros(np.shape(own[0]))
        with np.errstate(over="ignore", invalid="ignore"):
            for i, (scale, x, f) in enumerate(zip(scales, own, information, strict=True)):
                share = scale * np.maximum(np.asarray(f, np.float64), 0.0 if i else least)
                total, weight = total + share * np.asarray(x, np.float64), weight + share
            return in_range(path, total / weight, jnp.result_type(own[0]), f"weights {weights} and floor {floor}")

    return jax.tree_util.tree_map_with_path(merged, *models, *fishers)


def _norm(information: Any, i: int) -> float:
    """The norm over all entries, in float64: the square of a small entry is 0 in float32."""
    flat = np.concatenate([np.zeros(0), *(np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(information))])
    if not (flat >= 0).all() or not np.isfinite(flat).all():
        raise UserError(f"the Fisher information of model {i} has entries that are negative or not finite")
    norm = float(np.linalg.norm(flat))
    if not 0 < norm < math.inf:
        raise UserError(f"the Fisher information of model {i} has norm {norm}: expected a positive finite number")
    return norm
