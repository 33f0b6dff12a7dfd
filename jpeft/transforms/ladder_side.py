"""Ladder-side tuning: a narrow side network, so that no gradient passes through the frozen encoder.

Sung et al. 2022, arXiv:2206.06522; reference: ylsung/Ladder-Side-Tuning. With backbone states h_0 (embeddings), h_1,
..., h_L behind a stop_gradient and a side network of width s = d / reduction_factor:

    side_0 = down_0(h_0)
    side_i = block_i(g_i side_(i-1) + (1 - g_i) down_i(h_i)),  g_i = sigmoid(alpha_i / 0.1),  i = 1 ... L
    encoder output = up(side_L)

The blocks are BERT layers with their own weights, and with the backbone's activation and epsilon. Training needs
neither the backward pass of the encoder nor its activations. At inference it adds about 1 / `reduction_factor` of the
encoder's cost, and it cannot be merged.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.leaves import init_sites, wide
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Setting, Transform
from jpeft.core.tree import at, union
from jpeft.models.bert import ACTIVATIONS, attends, attention_scores
from jpeft.transforms.parts.linear import counts, kaiming_uniform, layer_norm, linear, linear_leaves, need_params
from jpeft.transforms.parts.places import find_encoders

__all__ = ["ladder_side"]

STARTS = ("magnitude", "fisher", "random")
TEMPERATURE = 0.1


def ladder_side(
    reduction_factor: int = 8, init_from: str = "magnitude", num_examples: int = 64, targets: str = "encoder"
) -> Transform:
    """A side network of width d / `reduction_factor` for one encoder.

    The side blocks start as copies of the backbone's, cut down to their most important parts: the same dimensions of
    the residual stream in all layers and, per layer, the channels of each head and the feed-forward nodes with the
    largest total importance. The importance of a weight is its magnitude or its Fisher information. Down- and
    up-samplers start from U(-1/sqrt(in), 1/sqrt(in)), alphas from 0.

    Args:
      reduction_factor: d / s; it must divide the head width and the feed-forward width.
      init_from: the importance, "magnitude" or "fisher"; with "random" all kernels start as the samplers do.
      num_examples: the number of examples for the Fisher information.
      targets: pattern of the site with arguments (hidden, mask) and output (hidden, all states), see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"down": linear [L + 1, d, s], "up": linear [s, d], "alpha": [L], "blocks": the
      parameters of a BERT layer with a leading axis L, split by head: query [L, s, h, k], output [L, h, k, s]}}.

    Raises:
      UserError: if an option is out of range; in `init`, if the target is not an encoder of BERT layers, the factor
        does not divide its widths, or no parameters are given although the side network starts from them.
    """
    counts(reduction_factor=reduction_factor, num_examples=num_examples)
    if init_from not in STARTS:
        raise UserError(f"init_from {init_from!r} is unknown: {nearest(init_from, STARTS)}")

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        if init_from != "random":
            params = need_params(params, "ladder_side")

        def make(key: Array, site: Site) -> Leaves:
            heads = _heads(sites, site)
            layers = None if params is None else wide(at(params, site.path))
            importance = None if init_from == "random" else jax.tree.map(jnp.abs, layers)
            return _start(key, site, heads, reduction_factor, layers, importance)

        return init_sites(key, find_encoders(sites, targets), make)

    def prepare(setting: Setting) -> Leaves:
        params, own = setting.variables["params"], setting.variables["peft"][setting.instance]
        # Without the side network, so that the gradients are those of the plain model.
        rest = {"params": params, "peft": {**setting.variables["peft"], setting.instance: {}}}
        leaves: Leaves = {}
        for path in own:
            site, layers = setting.sites[path], wide(at(params, path))

            def loss(part: Params, example: Any, rest: Params, path: str = path) -> Array:
                nested = part
                for name in reversed(path.split("/")):
                    nested = {name: nested}
                return setting.loss(union(rest, {"params": nested}), example)

            importance = setting.fisher(loss, layers, num_examples, rest)
            heads = _heads(setting.sites, site)
            leaves[path] = _start(setting.key, site, heads, reduction_factor, layers, importance)
        return leaves

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> tuple[Array, Any]:
        hidden, mask = args
        _, states = call(hidden, mask)
        states = jax.lax.stop_gradient(states)
        down = [linear(h, jax.tree.map(lambda x, i=i: x[i], leaves["down"])) for i, h in enumerate(states)]
        config = getattr(ctx.model, "config", None)
        activation, epsilon = getattr(config, "hidden_act", "gelu"), getattr(config, "layer_norm_eps", 1e-12)
        gates, visible, side = jax.nn.sigmoid(leaves["alpha"] / TEMPERATURE), attends(mask), down[0]
        for i, rung in enumerate(down[1:]):
            gate = gates[i].astype(side.dtype)
            block = jax.tree.map(lambda x, i=i: x[i], leaves["blocks"])
            side = _block(block, gate * side + (1 - gate) * rung, visible, ACTIVATIONS[activation], epsilon)
        return linear(side, leaves["up"]), states

    return Transform("ladder_side", init, wrap, prepare=prepare if init_from == "fisher" else None)


def _block(p: Leaves, x: Array, visible: Array, activation: Callable[[Array], Array], epsilon: float) -> Array:
    """One BERT layer: x [b, t, s], `visible` [b, 1, t, t]."""
    p = jax.tree.map(lambda leaf: leaf.astype(x.dtype), p)
    query, key, value = (
        jnp.einsum("bts,shk->bhtk", x, p[name]["kernel"]) + p[name]["bias"][None, :, None]
        for name in ("query", "key", "value")
    )
    scores = attention_scores(query, key) * query.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(x.dtype)
    context = jnp.einsum("bhqt,bhtk->bhqk", probs, value)
    attended = jnp.einsum("bhtk,hks->bts", context, p["output"]["kernel"]) + p["output"]["bias"].reshape(1, 1, -1)
    x = layer_norm(x + attended, p["attention_norm"], epsilon)
    hidden = activation(linear(x, p["intermediate"]))
    return layer_norm(x + linear(hidden, p["ffn_output"]), p["ffn_norm"], epsilon)


def _heads(sites: Sites, site: Site) -> int:
    """The number of heads of the encoder's attention."""
    core = f"{site.path}/layer_0/attention/core"
    if core not in sites:
        raise UserError(f"site {site.path!r} is not an encoder of BERT layers: ladder_side needs {core!r}")
    return sites[core].args[2].shape[1]


def _start(
    key: Array, site: Site, heads: int, factor: int, layers: Any, importance: Mapping[str, Any] | None
) -> Leaves:
    """The leaves: random samplers, and blocks cut out of the backbone's layers, or random if there is no importance."""
    d = site.args[0].shape[-1]
    names = sorted(site.params, key=lambda name: int(name.removeprefix("layer_")))
    inner = site.params[names[0]]["ffn"]["intermediate"]["kernel"].shape[1]
    channels = d // heads
    for what, width in (("head width", channels), ("feed-forward width", inner)):
        if width % factor:
            raise UserError(f"reduction_factor {factor} does not divide the {what} {width}")
    s, k, nodes, count = d // factor, channels // factor, inner // factor, len(names)
    down, up, blocks = jax.random.split(key, 3)
    kernels = jnp.stack([kaiming_uniform(each, (d, s)) for each in jax.random.split(down, count + 1)])
    leaves = {
        "down": {"kernel": kernels, "bias": jnp.zeros((count + 1, s))},
        "up": linear_leaves(kaiming_uniform(up, (s, d))),
        "alpha": jnp.zeros(count),
    }
    if importance is None:
        drawn = [_drawn(each, s, heads, k, nodes) for each in jax.random.split(blocks, count)]
    else:
        stream = _top(jnp.stack([_stream(importance[name]) for name in names]).sum(0), s)
        drawn = [_cut(layers[name], importance[name], stream, heads, k, nodes) for name in names]
    return {**leaves, "blocks": jax.tree.map(lambda *each: jnp.stack(each), *drawn)}


def _drawn(key: Array, s: int, heads: int, k: int, nodes: int) -> Leaves:
    """A block with fresh kernels, zero biases and the norms of a fresh model."""
    keys = jax.random.split(key, 6)
    dense = {
        name: {"kernel": kaiming_uniform(each, (s, heads * k)).reshape(s, heads, k), "bias": jnp.zeros((heads, k))}
        for name, each in zip(("query", "key", "value"), keys[:3], strict=True)
    }
    norm = {"scale": jnp.ones(s), "bias": jnp.zeros(s)}
    return {
        **dense,
        "output": {"kernel": kaiming_uniform(keys[3], (heads * k, s)).reshape(heads, k, s), "bias": jnp.zeros(s)},
        "attention_norm": norm,
        "intermediate": linear_leaves(kaiming_uniform(keys[4], (s, nodes))),
        "ffn_output": linear_leaves(kaiming_uniform(keys[5], (nodes, s))),
        "ffn_norm": norm,
    }


def _stream(layer: Any) -> Array:
    """The importance [d] of each residual stream dimension: of all weights of a layer that read or write it."""
    attention, ffn = layer["attention"], layer["ffn"]
    read = [attention[name]["kernel"] for name in ("query", "key", "value")] + [ffn["intermediate"]["kernel"]]
    written = [attention["output"]["kernel"], ffn["output"]["kernel"]]
    return jnp.stack([*(w.sum(1) for w in read), *(w.sum(0) for w in written)]).sum(0)


def _top(scores: Array, n: int) -> Array:
    """The indices of the n highest scores along the last axis, in ascending order."""
    return jnp.sort(jnp.argsort(-scores, axis=-1, stable=True)[..., :n], axis=-1)


def _cut(layer: Any, importance: Any, stream: Array, heads: int, k: int, nodes: int) -> Leaves:
    """One backbone layer, cut down to the chosen stream dimensions and its own best channels and nodes."""

    def per_head(w: Array) -> Array:  # [d, h * c] or [h * c] to [..., h, c]
        return w.reshape(*w.shape[:-1], heads, -1)

    attention, ffn, score = layer["attention"], layer["ffn"], importance["attention"]
    out = attention["output"]["kernel"].T
    of = {name: per_head(score[name]["kernel"].sum(0)) for name in ("query", "key", "value")}
    written = per_head(score["output"]["kernel"].sum(1))
    # Channels of query and key must match, and so must those of value and output.
    matched = {"query": of["query"] + of["key"], "value": of["value"] + written}
    best = {name: _top(scores, k) for name, scores in matched.items()}
    best["key"] = best["query"]
    heads_ = jnp.arange(heads)[:, None]

    def cut(name: str) -> Leaves:
        kernel, bias = per_head(attention[name]["kernel"]), per_head(attention[name]["bias"])
        return {"kernel": kernel[stream][:, heads_, best[name]], "bias": bias[heads_, best[name]]}

    inner = importance["ffn"]
    best_nodes = _top(inner["intermediate"]["kernel"].sum(0) + inner["output"]["kernel"].sum(1), nodes)
    first, second = ffn["intermediate"], ffn["output"]
    norm = {name: layer[name]["LayerNorm"] for name in ("attention_add_norm", "ffn_add_norm")}
    return {
        **{name: cut(name) for name in ("query", "key", "value")},
        "output": {
            "kernel": per_head(out[stream])[:, heads_, best["value"]].transpose(1, 2, 0),
            "bias": attention["output"]["bias"][stream],
        },
        "attention_norm": jax.tree.map(lambda x: x[stream], norm["attention_add_norm"]),
        "intermediate": {"kernel": first["kernel"][stream][:, best_nodes], "bias": first["bias"][best_nodes]},
        "ffn_output": {"kernel": second["kernel"][best_nodes][:, stream], "bias": second["bias"][stream]},
        "ffn_norm": jax.tree.map(lambda x: x[stream], norm["ffn_add_norm"]),
    }
