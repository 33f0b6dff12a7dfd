"""One model from several of the same shape: the average of their parameters, weighted by Fisher information.

Matena and Raffel 2022, arXiv:2111.09832. With the posterior of each model taken for a normal distribution around its
parameters, with the diagonal Fisher information as its precision, the product of the posteriors is largest at

    theta = sum_k weight_k F_k theta_k / sum_k weight_k F_k

entry by entry. An entry that no model has information about gets the plain weighted average.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.core.errors import UserError

__all__ = ["fisher_average"]


def fisher_average(
    models: Sequence[Any], fishers: Sequence[Any], weights: Sequence[float] | None = None, floor: float = 1e-6
) -> Any:
    """Merges models, or modules, that were trained apart from the same start.

    Args:
      models: pytrees of one structure: parameters, or the leaves of one transform. Leave out what the tasks do not
        share, such as the head.
      fishers: the Fisher information of each, as `jpeft.fisher` gives it at the trained parameters.
      weights: what each counts, 0 or more; None means 1 each.
      floor: the least information of an entry, as in the reference, where none is left at 0.

    Returns:
      A pytree like one of the models, with the dtypes of the first.

    Raises:
      UserError: if there are no models, their shapes differ, or numbers of models, Fishers and weights do.
    """
    models, fishers = list(models), list(fishers)
    weights = [1.0] * len(models) if weights is None else list(weights)
    if not models or not len(models) == len(fishers) == len(weights):
        raise UserError(f"{len(models)} models, {len(fishers)} Fishers and {len(weights)} weights: one each is needed")
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0 or not floor > 0:
        raise UserError(f"weights must be 0 or more and not all 0, and floor above 0, got {weights} and {floor}")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (*models, *fishers)]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError("the models and their Fisher information must have one structure and one set of shapes")

    def merged(*leaves: Any) -> Any:
        own, information = leaves[: len(models)], leaves[len(models) :]
        scales = [weight * jnp.maximum(f, floor) for weight, f in zip(weights, information, strict=True)]
        total = sum(scale * x for scale, x in zip(scales, own, strict=True)) / sum(scales)
        return jnp.asarray(total, own[0].dtype)

    return jax.tree.map(merged, *models, *fishers)
