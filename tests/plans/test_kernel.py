"""Plans in a linear model, against many small steps of gradient descent on it."""

import itertools

import numpy as np
import pytest

from jpeft.plans import kernel

N, HALF, CLASSES, LAYERS = 10, 6, 2, 3
RNG = np.random.default_rng(0)
JACOBIANS = {layer: {name: 0.3 * RNG.normal(size=(N, CLASSES, 4)) for name in "xyz"} for layer in range(LAYERS)}
START, TARGETS = RNG.normal(size=(N, CLASSES)), RNG.normal(size=(N, CLASSES))


def squares(logits, rows):
    return float(((logits - TARGETS[rows]) ** 2).sum(-1).mean())


def linear(time=3.0, half=HALF, jacobians=JACOBIANS):
    flat = {layer: {name: j.reshape(N * CLASSES, -1) for name, j in row.items()} for layer, row in jacobians.items()}
    kernels = {layer: {name: j @ j.T for name, j in row.items()} for layer, row in flat.items()}
    return kernel.Linear(kernels, START, -2 * (START - TARGETS), 2.0, half, time, squares)


def descended(plan, a, b, time, steps=4_000):
    """The loss on b after gradient descent on the mean loss of a, with tiny steps."""
    jacobian = np.concatenate([JACOBIANS[layer][name] for layer, name in plan.items()], -1)
    weights = np.zeros(jacobian.shape[-1])
    for _ in range(steps):
        residual = 2 * (START[a] + jacobian[a] @ weights - TARGETS[a])
        weights -= time / steps * np.einsum("nc,ncp->p", residual, jacobian[a]) / len(a)
    return squares(START[b] + jacobian[b] @ weights, b)


@pytest.mark.parametrize("plan", [{0: "x", 1: "y", 2: "z"}, {1: "z"}])
@pytest.mark.parametrize("time", [0.5, 20.0])
def test_a_plan_reaches_what_gradient_descent_reaches(plan, time):
    a, b = np.arange(HALF), np.arange(HALF, N)
    both_ways = (descended(plan, a, b, time) + descended(plan, b, a, time)) / 2
    assert kernel.held_out_loss(linear(time), plan) == pytest.approx(both_ways, rel=1e-3)


def test_no_module_and_no_time_leave_the_loss_as_it_was():
    whole = (squares(START[:HALF], np.arange(HALF)) + squares(START[HALF:], np.arange(HALF, N))) / 2
    assert kernel.held_out_loss(linear(), {}) == pytest.approx(whole)
    assert kernel.held_out_loss(linear(0.0), {0: "x"}) == pytest.approx(whole)


@pytest.mark.parametrize("seed", range(8))
def test_the_plan_is_one_that_no_single_change_improves(seed):
    rng = np.random.default_rng(seed)
    of = linear(jacobians={i: {name: rng.normal(size=(N, CLASSES, 4)) for name in "xyz"} for i in range(LAYERS)})
    plan = kernel.best(of)
    lowest = kernel.held_out_loss(of, plan)
    for layer, name in itertools.product(range(LAYERS), "xyz"):
        assert kernel.held_out_loss(of, {**plan, layer: name}) >= lowest
    assert all(kernel.held_out_loss(of, dict.fromkeys(range(LAYERS), name)) >= lowest for name in "xyz")


def test_the_scores_of_layers_choose_that_plan_and_say_what_a_module_gains():
    of = linear()
    table, plan = kernel.scores(of), kernel.best(of)
    assert {layer: max(row, key=row.get) for layer, row in table.items()} == plan
    without = {layer: name for layer, name in plan.items() if layer != 1}
    gain = kernel.held_out_loss(of, without) - kernel.held_out_loss(of, plan)
    assert table[1][plan[1]] == pytest.approx(gain)
