"""Which parameters, or which modules, train."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["SELECTIONS", "Selection", "full", "head"]


class Selection(NamedTuple):
    """Which base parameters train beside the head, by path, and the learning rate when none is given."""

    trains: Callable[[tuple[str, ...]], bool]
    learning_rate: float


def full(path: tuple[str, ...]) -> bool:
    """Everything trains: ordinary fine-tuning."""
    del path
    return True


def head(path: tuple[str, ...]) -> bool:
    """Nothing of the base trains: a classifier on frozen features."""
    del path
    return False


SELECTIONS: dict[str, Selection] = {
    "full": Selection(full, 2e-5),
    "head": Selection(head, 1e-3),
}
