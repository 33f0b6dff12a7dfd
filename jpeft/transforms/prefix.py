"""Prefix tuning: trained keys and values prepended in every layer (Li and Liang 2021, arXiv:2101.00190)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.leaves import fold_sites, init_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import SHARED, Call, Context, Leaves, Params, Transform, site_key
from jpeft.transforms.parts.gate import gate_leaves, gate_value
from jpeft.transforms.parts.inputs import behind
from jpeft.transforms.parts.linear import linear, sizes, uniform_linear
from jpeft.transforms.parts.places import find_cores, find_inputs

__all__ = ["prefix"]


def prefix(
    num_virtual_tokens: int = 10,
    mlp_hidden: int | None = 512,
    layers: Sequence[int] | None = None,
    targets: str = "attention/core",
    gate: bool = False,
    shift_positions: bool = False,
) -> Transform:
    """Attention over [P_k; K] and [P_v; V], with P = `num_virtual_tokens` rows that every token of every row sees.

    With an MLP, all layers share an embedding [P, d] ~ N(0, 1) and tanh(embedding @ W1 + b1) [P, hidden]; each layer
    maps that to its keys and values with its own linear layers. `fold` computes them once and drops the MLP.
    Without an MLP (`mlp_hidden=None`) keys and values are the parameters. Linear layers start as in PyTorch, from
    U(-1/sqrt(in), 1/sqrt(in)); flat keys and values from N(0, 0.02^2).
    The positions of the text start from 0, as in AdapterHub, unless `shift_positions` makes them start from P. That is
    what Hugging Face peft does, in training too, so a prefix of peft's needs it, and peft takes no other. A pretrained
    encoder then sees its texts where it never saw one begin, and the longest input is P tokens shorter. Two prefixes
    that both shift add up: in a plan, let one do it.
    With `gate`, as in UniPELT (arXiv:2110.07577), each layer's keys and values are scaled for each example by the mean
    over its real tokens of sigmoid(x w + b), where x is the layer's input; see `jpeft.transforms.parts.gate`.
    At inference a prefix costs 4 P d floating-point operations per token and layer. It cannot be merged.

    Args:
      num_virtual_tokens: P.
      mlp_hidden: the hidden size of the reparametrisation, 512 in AdapterHub and the FishPAL thesis; None for none.
      layers: only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, query, key, value, mask), heads before time; see `jpeft.find`.
      gate: whether keys and values are gated.
      shift_positions: whether positions start from P. It needs a model with the site "embeddings/inputs".

    Returns:
      A transform with leaves {"shared": {"embedding": [P, d], "mlp": linear [d, hidden]}, path: {"key": linear
      [hidden, d], "value": linear [hidden, d]}}, or {path: {"key": [P, d], "value": [P, d]}} when flat or folded; with
      `gate`, each path also has "gate": linear [d, 1]; with `shift_positions`, there is an empty "embeddings/inputs".

    Raises:
      UserError: if a size is out of range; in `init`, if a target is missing; in the forward pass, if positions are
        shifted and the input is longer than the P tokens leave room for.
    """
    sizes(num_virtual_tokens=num_virtual_tokens, mlp_hidden=mlp_hidden)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params
        where = find_cores(sites, targets, layers)
        # A site is reached where it has an entry, though it be an empty one.
        shifted = {site.path: {} for site in find_inputs(sites, "embeddings/inputs")} if shift_positions else {}

        def flat(key: Array, site: Site) -> Leaves:
            k, v = jax.random.split(key)
            shape = (num_virtual_tokens, _width(site))
            return {"key": 0.02 * jax.random.normal(k, shape), "value": 0.02 * jax.random.normal(v, shape)}

        def gates(key: Array, site: Site) -> Leaves:
            return {"gate": gate_leaves(site.args[0].shape[-1], site_key(key, "gate"))} if gate else {}

        if mlp_hidden is None:
            return {**init_sites(key, where, lambda key, site: {**flat(key, site), **gates(key, site)}), **shifted}

        def mapped(key: Array, site: Site, hidden: int = mlp_hidden) -> Leaves:
            k, v = jax.random.split(key)
            d = _width(site)
            return {"key": uniform_linear(k, hidden, d), "value": uniform_linear(v, hidden, d)}

        embedding, mlp = jax.random.split(site_key(key, SHARED))
        d = _width(where[0])
        shared = {
            "embedding": jax.random.normal(embedding, (num_virtual_tokens, d)),
            "mlp": uniform_linear(mlp, d, mlp_hidden),
        }
        own = init_sites(key, where, lambda key, site: {**mapped(key, site), **gates(key, site)})
        return {SHARED: shared, **own, **shifted}

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Any:
        if not leaves:
            return call(*behind(num_virtual_tokens, args, ctx))
        hidden, query, key, value, mask = args
        own = _keys_values(leaves, ctx.shared)
        rows = (*mask.shape[:-1], own["key"].shape[0])
        keys, values = _heads(own["key"], key), _heads(own["value"], value)
        if gate:
            opened = gate_value(hidden, leaves["gate"], ctx.mask)[:, None]
            keys, values = keys * opened, values * opened
        return call(
            hidden,
            query,
            jnp.concatenate([keys, key], axis=-2),
            jnp.concatenate([values, value], axis=-2),
            jnp.concatenate([jnp.ones(rows, bool), mask], axis=-1),
        )

    def fold(leaves: Leaves) -> Leaves:
        shared = leaves.get(SHARED, {})
        return fold_sites(leaves, lambda own: {**own, **_keys_values(own, shared)} if own else own)

    return Transform("prefix", init, wrap, fold=fold)


def _keys_values(leaves: Leaves, shared: Params) -> dict[str, Array]:
    """The prefix of one site, {"key": [P, d], "value": [P, d]}, through the MLP if present."""
    if not shared:
        return leaves
    hidden = jnp.tanh(linear(shared["embedding"], shared["mlp"]))
    return {name: linear(hidden, leaves[name]) for name in ("key", "value")}


def _heads(rows: Array, like: Array) -> Array:
    """[P, d] to [b, h, P, k], in the dtype of `like` [b, h, t, k]."""
    b, h, _, k = like.shape
    rows = rows.reshape(-1, h, k).swapaxes(0, 1).astype(like.dtype)
    return jnp.broadcast_to(rows[None], (b, *rows.shape))


def _width(site: Site) -> int:
    """d = heads * head width, from the site's key [b, h, t, k]."""
    return site.args[2].shape[1] * site.args[2].shape[3]
