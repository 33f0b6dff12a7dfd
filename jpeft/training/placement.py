"""Where arrays lie on several devices: rows divided among them, all else on each of them, or the base in parts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.data.batching import Batch

__all__ = ["all_devices", "divided", "frozen", "own_devices", "put", "rows", "whole"]

ROWS = "rows"  # the axis of the mesh


def all_devices() -> Mesh | None:
    """All devices in a row, those of other processes included; None if there is only one."""
    return _in_a_row(jax.devices())


def own_devices() -> Mesh | None:
    """The devices of this process in a row; None if there is only one."""
    return _in_a_row(jax.local_devices())


def _in_a_row(devices: Sequence[Any]) -> Mesh | None:
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), (ROWS,), axis_types=(AxisType.Auto,), devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, batch: Any) -> Any:
    """The shardings of a batch, or its parts, whose rows are divided; the arrays are [b, ...], or [runs, b, ...]."""

    def of(part: Batch) -> Batch:
        axis = len(part.weights.shape) - 1
        return jax.tree.map(lambda _: NamedSharding(mesh, P(*(None,) * axis, ROWS)), part)

    return jax.tree.map(of, batch, is_leaf=lambda x: isinstance(x, Batch))


def put(tree: Any, shardings: Any) -> Any:
    """Puts arrays on devices. With several processes, each has all of every array and puts its own part of it.

    Args:
      tree: of arrays.
      shardings: like `tree`, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(_put_own, tree, shardings)


def _put_own(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put_own(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def frozen(mesh: Mesh, variables: dict[str, Any], shard_base: bool) -> dict[str, Any]:
    """Puts on the devices what does not train: the base, "params", whole or in parts, the leaves whole."""
    base = variables["params"]
    over = divided(mesh, base) if shard_base else whole(mesh)
    return {"params": put(base, over), "peft": put(variables["peft"], whole(mesh))}


def divided(mesh: Mesh, tree: Any) -> Any:
    """The shardings of arrays of which each device holds a part, along the longest axis that it divides evenly.

    XLA gathers the parts of a layer when it is their turn ("fully sharded data parallel", Rajbhandari et al. 2020,
    arXiv:1910.02054, stage 3). Arrays without such an axis are on every device.
    """

    def of(x: Any) -> NamedSharding:
        fits = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        if not fits:
            return whole(mesh)
        longest = max(fits, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*(None,) * longest, ROWS))

    return jax.tree.map(of, tree)
