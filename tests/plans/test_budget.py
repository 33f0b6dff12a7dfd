"""The best plan under a budget, against a search of all plans."""

import itertools

import numpy as np
import pytest

from jpeft import Entry, UserError
from jpeft.plans.budget import Cost, allocate

CANDIDATES = {"small": Entry("lora", {"rank": 1}), "large": Entry("lora", {"rank": 4}), "prefix": Entry("prefix")}
COSTS = {"small": Cost(10), "large": Cost(40), "prefix": Cost(5, shared=60)}


def search(scores, budget):
    """The highest total score, by trying every plan."""
    best = 0.0
    for names in itertools.product([None, *CANDIDATES], repeat=len(scores)):
        cost = sum(COSTS[n].own for n in names if n) + sum(COSTS[n].shared for n in set(names) if n)
        if cost <= budget:
            best = max(best, sum(row[n] for row, n in zip(scores.values(), names, strict=True) if n))
    return best


@pytest.mark.parametrize("budget", [10, 45, 70, 75, 90, 130, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_plans(budget, seed):
    rng = np.random.default_rng(seed)
    scores = {layer: {name: float(rng.normal(0.5)) for name in CANDIDATES} for layer in range(5)}
    names = {id(entry): name for name, entry in CANDIDATES.items()}
    plan = allocate(scores, CANDIDATES, COSTS, budget)
    chosen = {layer: names[id(entry)] for layer, (entry,) in plan.items()}
    cost = sum(COSTS[n].own for n in chosen.values()) + sum(COSTS[n].shared for n in set(chosen.values()))
    assert cost <= budget
    assert sum(scores[layer][n] for layer, n in chosen.items()) == pytest.approx(search(scores, budget))
    assert all(scores[layer][n] > 0 for layer, n in chosen.items())


def test_scores_of_any_size():
    scores = {0: {"small": 1e-9, "large": 3e-9, "prefix": 0.0}, 1: {"small": 2e-9, "large": 1e-9, "prefix": 0.0}}
    assert allocate(scores, CANDIDATES, COSTS, 50) == {0: [CANDIDATES["large"]], 1: [CANDIDATES["small"]]}


@pytest.mark.parametrize("seed", range(8))
def test_it_is_exact_in_the_layers_that_hardly_count(seed):
    rng = np.random.default_rng(seed)
    scale = [1.0, *10 ** -rng.uniform(2, 6, 4)]
    scores = {layer: {name: float(scale[layer] * rng.uniform(0.1, 1)) for name in CANDIDATES} for layer in range(5)}
    names = {id(entry): name for name, entry in CANDIDATES.items()}
    plan = allocate(scores, CANDIDATES, COSTS, 130)
    total = sum(scores[layer][names[id(entry)]] for layer, (entry,) in plan.items())
    assert total == pytest.approx(search(scores, 130), rel=1e-9)


def test_what_cannot_be():
    row = {"small": 1.0, "large": 2.0, "prefix": 1.0}
    with pytest.raises(UserError, match="the budget of 9 parameters is too small: the smallest module has 10"):
        allocate({0: row}, CANDIDATES, COSTS, 9)
    with pytest.raises(UserError, match="no candidate has a positive score"):
        allocate({0: dict.fromkeys(row, -1.0)}, CANDIDATES, COSTS, 90)
