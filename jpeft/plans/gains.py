"""What a module promises to gain in a layer, from the gradients of its entries.

A gain is estimated for every entry of a candidate's leaves, and summed over its entries in a layer. Scores of different
kinds of modules can be compared only in units of the loss: those of `adam_step` are, sums of squares are not.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.partition import map_leaves
from jpeft.core.site import layer_of
from jpeft.core.transform import SHARED, Leaves

__all__ = ["Moments", "Rate", "adam_size", "adam_step", "by_layer", "moments", "together", "trace"]

Rate = Callable[[tuple[str, ...]], float]


class Moments(NamedTuple):
    """Gradients of single examples with respect to some leaves.

    Attributes:
      mean: like the leaves, float64.
      square: like the leaves, the mean of the squares.
      n: the number of examples.
    """

    mean: Leaves
    square: Leaves
    n: int


def moments(stacked: Leaves, n: int) -> Moments:
    """From `jpeft.fisher(..., values="moments")` over n examples."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), stacked)
    return Moments(jax.tree.map(lambda x: x[0], wide), jax.tree.map(lambda x: x[1], wide), n)


def together(a: Moments, b: Moments) -> Moments:
    """The moments over the examples of both."""
    n = a.n + b.n
    mean, square = (jax.tree.map(lambda x, y: (a.n * x + b.n * y) / n, a[i], b[i]) for i in (0, 1))
    return Moments(mean, square, n)


def trace(of: Moments) -> Leaves:
    """The squared gradients. Their sum over a module is the trace of its tangent kernel, for one example."""
    return of.square


def adam_step(a: Moments, b: Moments, rate: Rate, batch_size: int) -> Leaves:
    """The decrease of the loss in one step of Adam, cross-fitted: taken on one half, measured on the other.

    A step of Adam moves an entry by about eta * u with u = g / sqrt(E[batch mean^2]), and E[batch mean^2] is
    g^2 + var / batch_size. On other examples, whose mean gradient is h, the loss falls by eta * u * h to first order.
    Where gradients are noise, u and h are independent and the average is zero: only what examples agree on counts.

    Args:
      a: of one half of the examples.
      b: of the other half; they have no example in common.
      rate: from the path of a leaf, instance first, to its learning rate eta.
      batch_size: of the training that is predicted.

    Returns:
      Like the leaves, the gain of each entry: the mean of both ways round, in units of the loss.
    """

    def one_way(a: Moments, b: Moments) -> Leaves:
        def gain(path: tuple[str, ...], mean: np.ndarray, square: np.ndarray, other: np.ndarray) -> np.ndarray:
            size = adam_size(mean, square, a.n, batch_size)
            return rate(path) * np.divide(mean, size, out=np.zeros_like(mean), where=size > 0) * other

        return _map(gain, a.mean, a.square, b.mean)

    return jax.tree.map(lambda x, y: (x + y) / 2, one_way(a, b), one_way(b, a))


def adam_size(mean: np.ndarray, square: np.ndarray, n: int, batch_size: int) -> np.ndarray:
    """What Adam divides a gradient by: the square root of E[batch mean^2], from the moments of n single gradients."""
    variance = np.maximum(square - mean**2, 0) * (n / max(1, n - 1))
    return np.sqrt(mean**2 + variance / batch_size)


def by_layer(entries: Leaves) -> dict[int, float]:
    """Sums the entries of a candidate's leaves, {instance: {site: leaves}}, layer by layer.

    Leaves that several layers share count once, in equal parts.

    Raises:
      UserError: if there are leaves outside the layers.
    """
    total: dict[int, float] = {}
    for instance, by_site in entries.items():
        own: dict[int, float] = {}
        for path, leaves in by_site.items():
            if path == SHARED:
                continue
            layer = layer_of(path)
            if layer is None:
                raise UserError(f"{instance} has leaves at {path!r}, which is not in a layer")
            own[layer] = own.get(layer, 0.0) + _sum(leaves)
        part = _sum(by_site.get(SHARED, {})) / max(1, len(own))
        for layer, value in own.items():
            total[layer] = total.get(layer, 0.0) + value + part
    return dict(sorted(total.items()))


def _sum(leaves: Any) -> float:
    return float(sum(np.sum(x, dtype=np.float64) for x in jax.tree.leaves(leaves)))


def _map(fn: Callable[..., np.ndarray], first: Leaves, *rest: Mapping[str, Any]) -> Leaves:
    """`fn(path, *arrays)` at every leaf of several trees of one structure."""
    others = [iter(jax.tree.leaves(tree)) for tree in rest]
    return map_leaves(lambda path, x: fn(path, x, *(next(other) for other in others)), first)
