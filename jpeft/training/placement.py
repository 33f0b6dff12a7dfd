"""Where arrays lie on several devices: rows divided among them, all else on each of them, or the base in parts."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.data.batching import Batch

__all__ = ["all_devices", "divided", "frozen", "rows", "whole"]

ROWS = "rows"  # the axis of the mesh


def all_devices() -> Mesh | None:
    """All devices in a row; None if there is only one."""
    devices = jax.devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), (ROWS,), axis_types=(AxisType.Auto,))


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, batch: Any) -> Any:
    """The shardings of a batch, or its parts, whose rows are divided; the arrays are [b, ...], or [runs, b, ...]."""

    def of(part: Batch) -> Batch:
        axis = len(part.weights.shape) - 1
        return Batch(*(NamedSharding(mesh, P(*(None,) * axis, ROWS)) for _ in part))

    return jax.tree.map(of, batch, is_leaf=lambda x: isinstance(x, Batch))


def frozen(mesh: Mesh, variables: dict[str, Any], shard_base: bool) -> dict[str, Any]:
    """Puts on the devices what does not train: the base, "params", whole or in parts, the leaves whole."""
    base = variables["params"]
    over = divided(mesh, base) if shard_base else whole(mesh)
    return {"params": jax.device_put(base, over), "peft": jax.device_put(variables["peft"], whole(mesh))}


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
