"""What Optuna is asked for: the points that a search tries next."""

import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np

from jpeft.core.errors import UserError
from jpeft.plans.plan import Plan
from jpeft.workbench import space as spaces
from jpeft.workbench.space import Point

__all__ = ["distributions", "needs_optuna", "sampler", "unseen"]


def needs_optuna() -> None:
    """Checks that Optuna is there.

    Raises:
      UserError: if it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("a search needs Optuna: pip install 'jpeft[search]'") from None


def distributions(choices: Mapping[str, int]) -> dict[str, Any]:
    """What Optuna draws from. Sizes are in order; of two choices, an order says nothing."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        name: CategoricalDistribution((0, 1)) if n == 2 else IntDistribution(0, n - 1) for name, n in choices.items()
    }


def sampler(startup: int, seed: int) -> Any:
    """Multivariate, since what a size is worth depends on the layers; other workers' trials count as poor ones."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, multivariate=True, constant_liar=True)


def unseen(
    choices: Mapping[str, int], plan_of: Callable[[Point], Plan], known: Container[str], rng: np.random.Generator
) -> dict[str, int]:
    """A random point whose plan has a module and is not known; there has to be one."""
    while True:
        point = {name: int(rng.integers(n)) for name, n in choices.items()}
        plan = plan_of(point)
        if plan and spaces.key(plan) not in known:
            return point
