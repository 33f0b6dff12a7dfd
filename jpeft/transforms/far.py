"""Freeze and reconfigure: only the feed-forward nodes that move most in a short priming phase are trained.

Vucetic et al. 2022, arXiv:2205.01541. A node of a feed-forward network is a column of the first kernel with its bias
and the row of the second kernel that reads it. Priming trains the feed-forward networks for a few steps and ranks each
node by the L1 distance that its weights moved. The top nodes of each layer become a smaller feed-forward network that
trains; everything else stays frozen.

Here the base is not rearranged. The frozen network runs as is, and the trained nodes add their change:

    first:   h = x W1 + b1,     h[nodes] += x A1 + c1
    second:  y = h W2 + b2,     y        += h[nodes] A2

with leaves {first: {"kernel": A1 [d, k], "bias": c1 [k]}, second: {"kernel": A2 [k, d]}}, which start at zero. The sum
over nodes needs no permutation, and gradients are computed only for the k nodes. Since the leaves are differences,
weight decay pulls towards the pretrained weights, not towards zero. `merge` adds them to the base.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import wide
from jpeft.core.site import Site, Sites, find
from jpeft.core.transform import FIXED, Call, Context, Leaves, Params, Setting, Transform
from jpeft.core.tree import at, replace
from jpeft.transforms.parts.linear import counts, positive

__all__ = ["distances", "far"]

FIRST, SECOND = "intermediate", "output"


def far(
    ratio: float = 0.1,
    num_examples: int = 512,
    batch_size: int = 16,
    learning_rate: float = 5e-5,
    layers: Sequence[int] | None = None,
    targets: str = "ffn",
) -> Transform:
    """Trains the feed-forward nodes that move most in a priming phase of `num_examples / batch_size` steps.

    `init` selects the first nodes of each layer; `prepare` primes on data and selects those that moved most.

    Args:
      ratio: fraction of the nodes of each feed-forward network to train; at least one is trained.
      num_examples: the number of examples for priming, each used once.
      batch_size: of the priming.
      learning_rate: of the priming, with Adam.
      layers: only in these layers; None means all.
      targets: pattern of modules with two Dense layers, "intermediate" and "output", see `jpeft.find`.

    Returns:
      A transform with leaves as above, each with the indices of its nodes under "fixed".

    Raises:
      UserError: if an option is out of range; in `init`, if a target is missing.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio must be above 0 and at most 1, got {ratio}")
    counts(num_examples=num_examples, batch_size=batch_size)
    positive(learning_rate=learning_rate)

    def where(sites: Sites) -> list[str]:
        found = find(sites, targets, layers, lambda site: _is_network(sites, site), "modules with two Dense layers")
        return [site.path for site in found]

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del key, params
        nodes = {path: _num_nodes(sites, path) for path in where(sites)}
        return _take(sites, {path: np.arange(max(1, int(ratio * n))) for path, n in nodes.items()})

    def prepare(setting: Setting) -> Leaves:
        params = setting.variables["params"]
        nets = {path: at(params, path) for path in where(setting.sites)}
        moved = _prime(setting, nets, num_examples, batch_size, learning_rate)
        if not all(np.isfinite(moves).all() for moves in moved.values()):
            raise UserError("the priming of far is not finite: look for NaN or Inf in the loss, or lower learning_rate")
        ranked = {path: np.argsort(-moves, kind="stable") for path, moves in moved.items()}
        chosen = {path: np.sort(order[: max(1, int(ratio * order.size))]) for path, order in ranked.items()}
        return _take(setting.sites, chosen)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        del site, ctx
        (x,) = args
        y, nodes, kernel = call(x), leaves[FIXED]["nodes"], leaves["kernel"].astype(x.dtype)
        if "bias" not in leaves:
            return y + x[..., nodes] @ kernel
        shift = leaves["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.at[..., nodes].add(x @ kernel + shift)

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            nodes = own[FIXED]["nodes"]
            where = (slice(None), nodes) if "bias" in own else nodes
            params = replace(params, f"{path}/kernel", lambda w, own=own, to=where: wide(w).at[to].add(own["kernel"]))
            if "bias" in own:
                params = replace(params, f"{path}/bias", lambda b, own=own, to=nodes: wide(b).at[to].add(own["bias"]))
        return params

    return Transform("far", init, wrap, merge, prepare=prepare)


def distances(before: Mapping[str, Any], after: Mapping[str, Any]) -> np.ndarray:
    """The L1 distance that each node of a feed-forward network moved: its column, bias and row; [nodes]."""
    gone = jax.tree.map(lambda a, b: np.abs(np.asarray(b, np.float64) - np.asarray(a, np.float64)), before, after)
    return gone[FIRST]["kernel"].sum(0) + gone[FIRST]["bias"] + gone[SECOND]["kernel"].sum(1)


def _prime(setting: Setting, nets: Leaves, num_examples: int, batch_size: int, rate: float) -> dict[str, np.ndarray]:
    """The distances of every node of the networks {path: parameters} after training them for a few steps."""
    optimizer, examples = optax.adam(rate), setting.sample(num_examples)
    # Without its own leaves, which `init` put at the first nodes.
    bare = {**setting.variables, "peft": {**setting.variables["peft"], setting.instance: {}}}
    n = len(jax.tree.leaves(examples)[0])

    @jax.jit
    def step(nets: Any, state: optax.OptState, batch: Any, variables: Any) -> tuple[Any, optax.OptState]:
        def loss(nets: Any) -> Array:
            params = variables["params"]
            for path, net in nets.items():
                params = replace(params, path, lambda old, net=net: net)
            return jnp.mean(jax.vmap(setting.loss, (None, 0))({**variables, "params": params}, batch))

        updates, state = optimizer.update(jax.grad(loss)(nets), state)
        return optax.apply_updates(nets, updates), state

    now, state, size = nets, optimizer.init(nets), min(batch_size, n)
    for start in range(0, n - size + 1, size):
        batch = jax.tree.map(lambda x, start=start: jnp.asarray(x)[start : start + size], examples)
        now, state = step(now, state, batch, bare)
    return {path: distances(net, now[path]) for path, net in nets.items()}


def _is_network(sites: Sites, site: Site) -> bool:
    """Whether a module has the two Dense layers that FAR needs, not stacked by a scan."""
    pair = [sites.get(f"{site.path}/{name}") for name in (FIRST, SECOND)]
    return all(site is not None and {"kernel", "bias"} <= set(site.params) and site.stack == () for site in pair)


def _num_nodes(sites: Sites, path: str) -> int:
    return sites[f"{path}/{FIRST}"].params["bias"].shape[0]


def _take(sites: Sites, nodes: Mapping[str, Any]) -> Leaves:
    """Zero leaves for the given nodes of the feed-forward networks at the given paths."""
    leaves: Leaves = {}
    for path, index in nodes.items():
        first, second = f"{path}/{FIRST}", f"{path}/{SECOND}"
        (d, _), (_, out) = (sites[name].params["kernel"].shape for name in (first, second))
        fixed, k = {"nodes": jnp.asarray(index, jnp.int32)}, len(index)
        leaves[first] = {"kernel": jnp.zeros((d, k)), "bias": jnp.zeros(k), FIXED: fixed}
        leaves[second] = {"kernel": jnp.zeros((k, out)), FIXED: fixed}
    return leaves
