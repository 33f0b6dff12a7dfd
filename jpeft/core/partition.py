"""Which parameters train, how fast, and which decay: all that an optimiser needs to know about a method."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jpeft.core import tree
from jpeft.core.errors import UserError, nearest
from jpeft.core.quantised import holds_quantised
from jpeft.core.transform import FIXED, STACKED, Chain, Leaves, Params, Transform, checked, instances, members

__all__ = ["Partition", "decays", "is_matrix", "map_leaves", "partition", "penalty", "rates", "split"]


class Partition(NamedTuple):
    """The variables of a model, split into a trainable and a frozen part.

    Attributes:
      trainable: {"params": the base parameters that train, "peft": the leaves that train}.
      frozen: {"params": the other parameters, "peft": the fixed leaves}. `jpeft.union(frozen, trainable)` gives the
        variables for `jpeft.apply`.
      rates: like `trainable`, the learning rate factor of each leaf.
      decays: like `trainable`, whether weight decay applies to a leaf: the `mask` of `optax.adamw` and others.
    """

    trainable: dict[str, Any]
    frozen: dict[str, Any]
    rates: dict[str, Any]
    decays: dict[str, Any]

    @property
    def scale(self) -> optax.GradientTransformation:
        """Per-leaf learning rates: multiplies the update of each leaf by its factor. Put it last in `optax.chain`."""
        return optax.stateless(lambda updates, params: jax.tree.map(lambda rate, u: rate * u, self.rates, updates))


def partition(transform: Transform | Chain, params: Params, leaves: Leaves, trains: Iterable[str] = ()) -> Partition:
    """Splits variables into trainable and frozen ones, with the learning rates and weight decay of the method.

        parts = jpeft.partition(method, params, leaves, trains=["classifier"])
        optimizer = optax.chain(optax.adamw(1e-3, mask=parts.decays), parts.scale)

    Args:
      transform: a method or a chain.
      params: the parameters of the model.
      leaves: the leaves of the transform.
      trains: a top-level name of `params`, or several, that train as well, such as the head.

    Returns:
      The parts. Arrays are not copied: an optimiser step that donates them needs a copy.

    Raises:
      UserError: if a name in `trains` is not in `params` or has quantised kernels, or the leaves are not those of the
        transform.
    """
    checked(transform, leaves)
    if not isinstance(trains, Iterable):
        raise UserError(f"trains must be names of `params`, got {trains!r:.60}")
    trains = [trains] if isinstance(trains, str) else list(trains)
    for name in trains:
        if name not in params:
            raise UserError(f"trains names {name!r}, which is not in params: {nearest(name, params)}")
        if holds_quantised(params[name]):
            raise UserError(f"trains names {name!r}, which has quantised kernels: train leaves, which lie beside them")
    own, rest = tree.split(params, lambda path: path[0] in trains)
    modified, fixed = split(leaves)
    trainable = {"params": own, "peft": modified}
    rate, decay = rates(transform), decays(transform)

    def by_leaf(of_params: Callable[..., Any], of_leaves: Callable[..., Any]) -> dict[str, Any]:
        return {
            "params": map_leaves(of_params, own),
            "peft": map_leaves(of_leaves, modified),
        }

    return Partition(
        trainable,
        {"params": rest, "peft": fixed},
        by_leaf(lambda path, x: 1.0, lambda path, x: rate(path)),
        by_leaf(is_matrix, decay),
    )


def split(leaves: Leaves) -> tuple[Leaves, Leaves]:
    """The leaves that train, and those under a "fixed" key. `jpeft.union` recombines them."""
    return tree.split(leaves, lambda path: FIXED not in path)


def rates(transform: Transform | Chain) -> Callable[[tuple[str, ...]], float]:
    """A function from a leaf's path, instance first, to its learning rate factor."""
    named = instances(transform)

    def rate(path: tuple[str, ...]) -> float:
        own = named[path[0]].rate
        return 1.0 if own is None else own(path[1:])

    return rate


def decays(transform: Transform | Chain) -> Callable[[tuple[str, ...], Any], bool]:
    """A function from a leaf's path, instance first, and the leaf to whether weight decay applies to it.

    Unless the method says otherwise, matrices decay. Biases, scales and other vectors do not: decay would only pull
    them away from the values that mean "no change". Axes that stack the leaves of a site's copies do not count.
    """
    named = instances(transform)

    def decay(path: tuple[str, ...], leaf: Any) -> bool:
        own = named[path[0]].decay
        return is_matrix(path, leaf) if own is None else own(path[1:], leaf)

    return decay


def is_matrix(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether a leaf is a matrix by its shape, and neither a bias nor a scale by its name."""
    return leaf.ndim - path.count(STACKED) >= 2 and path[-1] not in ("bias", "scale")


def penalty(transform: Transform | Chain, logits: Array, again: Callable[[], Array]) -> Array:
    """The term that the members add to the training loss of each example, [b]; zeros for all methods but AdaMix.

    Args:
      transform: a method or a chain.
      logits: [b, c], from this training pass; of logits [b, t, c] at every token, the term is [b, t].
      again: returns the logits of another pass over the same batch, with another dropout key.
    """
    added = [member.penalty(logits, again) for member in members(transform) if member.penalty is not None]
    return sum(added, jnp.zeros(logits.shape[:-1], jnp.float32))


def map_leaves(fn: Callable[[tuple[str, ...], Any], Any], arrays: Any) -> Any:
    """A tree like `arrays` with fn(path, leaf) at every leaf."""

    def at_leaf(keys: Any, x: Any) -> Any:
        if any(not hasattr(key, "key") for key in keys):
            raise UserError(f"expected nested dicts of arrays, got a list or tuple at {jax.tree_util.keystr(keys)}")
        return fn(tuple(key.key for key in keys), x)

    return jax.tree_util.tree_map_with_path(at_leaf, arrays)
