"""P-tuning: a prompt whose vectors come from a small trained encoder (Liu et al. 2021, arXiv:2103.10385).

Reference: THUDM/P-tuning; the encoders have the shapes of those in Hugging Face peft, whose weights map one to one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.leaves import fold_sites, init_sites
from jpeft.core.site import Site, Sites
from jpeft.core.transform import FIXED, Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.inputs import around_words, width, word_embeddings
from jpeft.transforms.parts.linear import dropout as drop
from jpeft.transforms.parts.linear import linear, rate, sizes, uniform_linear
from jpeft.transforms.parts.places import find_inputs
from jpeft.transforms.prompt import check_ids

__all__ = ["p_tuning"]

ENCODERS = ("lstm", "mlp")
TARGET = "embeddings/inputs"
PROMPT, INPUT = "prompt", "input"


def p_tuning(
    num_virtual_tokens: int = 9,
    encoder: str = "lstm",
    hidden: int = 128,
    num_layers: int = 2,
    dropout: float = 0.0,
    template: Sequence[str | int] | None = None,
) -> Transform:
    """P vectors around the text, computed by an encoder from P trained embeddings, optionally mixed with real tokens.

    "lstm": a bidirectional LSTM of `num_layers` layers with `hidden` units per direction, then linear 2h to 2h, relu,
    linear 2h to d. "mlp": linear d to h, relu, linear h to h, relu, linear h to d. Embeddings start from N(0, 1),
    linear layers from U(-1/sqrt(in), 1/sqrt(in)) and LSTMs from U(-1/sqrt(h), 1/sqrt(h)), as in PyTorch.

    `template` gives the order: "prompt" is the next virtual token; an integer is an anchor, the real token with that
    id, whose word vector is frozen; "input" is the text, [CLS] to [SEP], which comes last if not named:
    ("prompt", 2054, "prompt", "input", "prompt"). None means only the virtual tokens, before the text. The head reads
    the first token: a virtual token or an anchor, as in peft, or [CLS] if the template starts with "input".

    `fold` runs the encoder once and stores its P vectors. At inference each row has that many more tokens.

    Args:
      num_virtual_tokens: P. Its authors' default is 9; with more than the text has, it hardly learns in a short run.
      encoder: "lstm" or "mlp".
      hidden: h.
      num_layers: of the LSTM; the MLP has three.
      dropout: between the layers of the LSTM, in training.
      template: "prompt" P times, token ids, and "input" at most once; see above.

    Returns:
      A transform with leaves {path: {"embedding": [P, d], "lstm": {"0": {"forward": {"input": linear [d, 4h],
      "recurrent": linear [h, 4h]}, "backward": ...}, ...}, "mlp": {"0": linear, ...}, "fixed": {"anchors": [A, d]}}};
      gates in the order input, forget, cell, output. Folded: {path: {"vectors": [P, d], "fixed": ...}}.

    Raises:
      UserError: if an option is unknown or out of range, or the template does not have P prompts and at most one text;
        in `init`, if the model has no "embeddings/inputs", or there are anchors but no parameters are given.
    """
    sizes(num_virtual_tokens=num_virtual_tokens, hidden=hidden, num_layers=num_layers)
    rate(dropout=dropout)
    if encoder not in ENCODERS:
        raise UserError(f"encoder {encoder!r} is unknown: {nearest(encoder, ENCODERS)}")
    order = tuple(template) if template is not None else (PROMPT,) * num_virtual_tokens
    known = all(part in (PROMPT, INPUT) or isinstance(part, int) for part in order)
    if order.count(PROMPT) != num_virtual_tokens or order.count(INPUT) > 1 or not known:
        raise UserError(
            f"template must have 'prompt' {num_virtual_tokens} times, token ids and 'input' at most once, got {order}"
        )
    split = order.index(INPUT) if INPUT in order else len(order)
    order = tuple(part for part in order if part != INPUT)
    anchors = [part for part in order if isinstance(part, int)]

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        if anchors and params is None:
            raise UserError("p_tuning takes its anchors from the model's word embeddings: pass `params` to init")

        def make(key: Array, site: Site) -> Leaves:
            d, (first, second, third) = width(site), jax.random.split(key, 3)
            leaves: Leaves = {"embedding": jax.random.normal(first, (num_virtual_tokens, d))}
            if encoder == "lstm":
                inputs = [d] + [2 * hidden] * (num_layers - 1)
                keys = jax.random.split(second, num_layers)
                leaves["lstm"] = {
                    str(i): _lstm_leaves(k, n, hidden) for i, (k, n) in enumerate(zip(keys, inputs, strict=True))
                }
                widths = [2 * hidden, 2 * hidden, d]
            else:
                widths = [d, hidden, hidden, d]
            keys = jax.random.split(third, len(widths) - 1)
            pairs = zip(keys, widths[:-1], widths[1:], strict=True)
            leaves["mlp"] = {str(i): uniform_linear(k, n, m) for i, (k, n, m) in enumerate(pairs)}
            if anchors and params is not None:
                table = word_embeddings(sites, params)
                check_ids(anchors, table)
                leaves[FIXED] = {"anchors": table[jnp.asarray(anchors)]}
            return leaves

        return init_sites(key, find_inputs(sites, TARGET), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> tuple[Array, ...]:
        key = ctx.key_at(site.path)
        vectors = leaves["vectors"] if "vectors" in leaves else _encode(leaves, dropout, key)
        if anchors:
            trained, frozen = iter(vectors), iter(leaves[FIXED]["anchors"])
            vectors = jnp.stack([next(trained) if part == PROMPT else next(frozen) for part in order])
        return call(*around_words(vectors[:split], vectors[split:], args))

    def fold(leaves: Leaves) -> Leaves:
        return fold_sites(leaves, _folded)

    return Transform("p_tuning", init, wrap, fold=fold)


def _folded(own: Leaves) -> Leaves:
    if "vectors" in own:
        return own
    return {"vectors": _encode(own, 0.0, None), **({FIXED: own[FIXED]} if FIXED in own else {})}


def _encode(leaves: Leaves, dropout: float, key: Array | None) -> Array:
    """The prompt vectors [P, d], always in float32: they are few."""
    x = leaves["embedding"]
    layers = [leaves["lstm"][str(i)] for i in range(len(leaves.get("lstm", {})))]
    for i, layer in enumerate(layers):
        if i and key is not None:
            x = drop(x, dropout, jax.random.fold_in(key, i))
        x = jnp.concatenate([_lstm(layer["forward"], x), _lstm(layer["backward"], x[::-1])[::-1]], -1)
    for i in range(len(leaves["mlp"])):
        x = linear(jax.nn.relu(x) if i else x, leaves["mlp"][str(i)])
    return x


def _lstm(leaves: Leaves, x: Array) -> Array:
    """One direction of one layer: [P, n] to [P, h], with PyTorch's equations."""

    def step(carry: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        i, f, g, o = jnp.split(gates + linear(h[None], leaves["recurrent"])[0], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros(leaves["recurrent"]["kernel"].shape[0], x.dtype)
    return jax.lax.scan(step, (start, start), linear(x, leaves["input"]))[1]


def _lstm_leaves(key: Array, n: int, h: int) -> Leaves:
    keys = jax.random.split(key, 4)
    directions = (("forward", keys[:2]), ("backward", keys[2:]))
    return {
        name: {"input": uniform_linear(i, n, 4 * h, h), "recurrent": uniform_linear(r, h, 4 * h)}
        for name, (i, r) in directions
    }
