"""What a plan reaches if its model is linear in what it trains: the tangent kernels of its modules.

Where weights move little, logits move along their gradients at the start. Under gradient descent with a preconditioner
P, the logits f of a held-out half B follow those of a half A that is trained on:

    f_B(t) = f_B + K_BA K_AA^+ (I - exp(-h t K_AA / n)) r_A / h,     K = J P J^T

J holds the gradients of the logits of all examples, r_A = -dL/df the residuals of A, h their slope, n the size of A
(Jacot et al. 2018, arXiv:1806.07572; for Adam, Malladi et al. 2023, arXiv:2210.05643). Kernels of modules add. So the
kernel of every plan is a sum of a few matrices, and what one module gains depends on which others the plan has.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jpeft.plans.fishpal import Scores

__all__ = ["Choice", "Linear", "best", "held_out_loss", "scores"]

Choice = Mapping[int, str]  # {layer: candidate}


class Linear(NamedTuple):
    """A model that is linear in the leaves of some candidates, seen on the examples of two halves.

    Attributes:
      kernels: {layer: {candidate: [n * C, n * C]}}, float64: by example, then by logit.
      logits: [n, C], at the start.
      residuals: [n, C], the negative gradients of the examples' losses with respect to their logits.
      slope: h, by how much a residual falls when its logit rises by one.
      half: the number of examples in A, which come first.
      time: t, the length of the training: steps times the mean multiple of the learning rate that is in the kernels.
      loss: (logits [m, C], the numbers of these m examples) -> their mean loss.
    """

    kernels: Mapping[int, Mapping[str, np.ndarray]]
    logits: np.ndarray
    residuals: np.ndarray
    slope: float
    half: int
    time: float
    loss: Callable[[np.ndarray, np.ndarray], float]


def held_out_loss(of: Linear, choice: Choice) -> float:
    """The loss on one half after training on the other: the mean of both ways round."""
    kernel = sum((of.kernels[layer][name] for layer, name in choice.items()), np.zeros(()))
    n, classes = of.logits.shape
    a, b = np.arange(of.half), np.arange(of.half, n)
    if not kernel.ndim:
        return (of.loss(of.logits[a], a) + of.loss(of.logits[b], b)) / 2
    kernel = kernel.reshape(n, classes, n, classes)
    return (_one_way(of, kernel, a, b) + _one_way(of, kernel, b, a)) / 2


def _one_way(of: Linear, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    size, classes = len(a) * of.logits.shape[1], of.logits.shape[1]
    values, vectors = np.linalg.eigh(kernel[a][:, :, a].reshape(size, size))
    # (1 - exp(-h t s / n)) / (h s), which is t / n where the eigenvalue s is zero.
    x = of.slope * of.time / len(a) * np.maximum(values, 0)
    reached = of.time / len(a) * np.divide(-np.expm1(-x), x, out=np.ones_like(x), where=x > 1e-12)
    weights = vectors @ (reached * (vectors.T @ of.residuals[a].reshape(size)))
    moved = kernel[b][:, :, a].reshape(-1, size) @ weights
    return of.loss(of.logits[b] + moved.reshape(-1, classes), b)


def best(of: Linear) -> dict[int, str]:
    """A plan that no change in a single layer improves: from the best uniform one on, until nothing changes."""
    names = list(next(iter(of.kernels.values())))
    plan = min((dict.fromkeys(of.kernels, name) for name in names), key=lambda each: held_out_loss(of, each))
    lowest = held_out_loss(of, plan)
    while True:
        before = plan
        for layer in of.kernels:
            losses = {name: held_out_loss(of, {**plan, layer: name}) for name in names}
            name = min(losses, key=losses.__getitem__)
            if losses[name] < lowest:
                plan, lowest = {**plan, layer: name}, losses[name]
        if plan is before:
            return plan


def scores(of: Linear) -> Scores:
    """By how much each candidate lowers the held-out loss in a layer, with the best plan in all others.

    So the best candidates of all layers together are that plan.
    """
    plan, table = best(of), {}
    for layer, row in of.kernels.items():
        without = held_out_loss(of, {other: name for other, name in plan.items() if other != layer})
        table[layer] = {name: without - held_out_loss(of, {**plan, layer: name}) for name in row}
    return table
