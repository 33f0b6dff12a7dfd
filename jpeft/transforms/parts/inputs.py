"""Changes a model's input: adds vectors before the text, with matching positions and mask, or moves the positions."""

import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Context, Leaves, Params
from jpeft.core.tree import at

__all__ = ["around_words", "before_states", "before_words", "behind", "lengthens", "width", "word_embeddings"]


def before_words(vectors: Array, args: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arguments of the site "embeddings/inputs" with vectors before the text, as in Hugging Face peft.

    They take the first positions and token type 0, the text moves after them, and all tokens of the row see them. On
    RoBERTa positions are consecutive, as with PyTorch's `inputs_embeds`.

    Args:
      vectors: [P, d].
      args: word vectors [b, t, d], token types, positions, mask [b, t], one segment per row.

    Returns:
      The same four with P + t tokens.
    """
    return around_words(vectors, vectors[:0], args)


def around_words(before: Array, after: Array, args: tuple[Array, ...]) -> tuple[Array, ...]:
    """Like `before_words`, with vectors after the text too: their positions follow its last real token.

    Attention knows order only from positions, so no vector is placed after the padding. They are placed before the
    text, or right after its first token if `before` is empty, so that [CLS] stays first. Rows stay padded on the
    right, and gates, which take the surplus of tokens over the mask to be leading prompts, count correctly.

    Args:
      before: [A, d].
      after: [B, d].
      args: as for `before_words`.

    Returns:
      The same four with A + B + t tokens.
    """
    words, token_types, positions, mask = args
    b, a, n = words.shape[0], len(before), len(before) + len(after)  # `len` would refuse a symbolic batch size
    start, behind = positions[:, :1], a + (mask > 0).sum(1, keepdims=True).astype(positions.dtype)
    steps = [start + jnp.arange(a, dtype=positions.dtype)[None]]
    steps.append(start + behind + jnp.arange(len(after), dtype=positions.dtype)[None])
    vectors = jnp.concatenate([before, after]).astype(words.dtype)[None]
    cut = 0 if a else 1

    def insert(x: Array, new: Array) -> Array:
        return jnp.concatenate([x[:, :cut], new, x[:, cut:]], 1)

    return (
        insert(words, jnp.broadcast_to(vectors, (b, *vectors.shape[1:]))),
        insert(token_types, jnp.zeros((b, n), token_types.dtype)),
        insert(positions + a, jnp.concatenate(steps, 1)),
        insert(mask, jnp.broadcast_to(mask[:, :1], (b, n))),
    )


def before_states(vectors: Array, args: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arguments (hidden [b, t, d], mask [b, t]) of an encoder with vectors before the states.

    That is after the embeddings' LayerNorm, without positions or token types, as in AdapterHub.
    """
    hidden, mask = args
    return _join(vectors, hidden), _longer(mask, len(vectors))


def behind(p: int, args: tuple[Array, ...], ctx: Context) -> tuple[Array, ...]:
    """The arguments of the site "embeddings/inputs" with the positions of the text counted from `p` on.

    That is where Hugging Face models count from when `p` tokens are in their cache. Padding stays where it is.

    Args:
      p: tokens that stand before the text without being in the input.
      args: word vectors [b, t, d], token types, positions, mask [b, t].
      ctx: of the wrap.

    Returns:
      The same four, with the same shapes.

    Raises:
      UserError: the model has positions for the t tokens, but not for `p` more.
    """
    words, token_types, positions, mask = args
    longest, tokens = getattr(getattr(ctx.model, "config", None), "max_length", None), words.shape[1]
    # More tokens than the model has positions are several texts in a row, each with positions of its own. A length that
    # is a symbol belongs to a program that says itself how long its inputs may be.
    if longest is not None and isinstance(tokens, int) and longest - p < tokens <= longest:
        raise UserError(
            f"input of {tokens} tokens; with the positions shifted by {p}, this model takes {longest - p} at most"
        )
    return words, token_types, jnp.where(mask > 0, positions + p, positions), mask


def _join(vectors: Array, rows: Array) -> Array:
    own = jnp.broadcast_to(vectors.astype(rows.dtype)[None], (rows.shape[0], *vectors.shape))
    return jnp.concatenate([own, rows], 1)


def _longer(mask: Array, p: int) -> Array:
    """The mask with p leading tokens of the row's own segment."""
    return jnp.concatenate([jnp.broadcast_to(mask[:, :1], (mask.shape[0], p)), mask], 1)


def lengthens(leaves: Leaves) -> bool:
    """Whether any of these leaves stand where rows get longer, or their positions later, so that less text fits."""
    paths = (path for own in leaves.values() for path in own)
    return any(path.endswith("embeddings/inputs") or path.split("/")[-1] == "encoder" for path in paths)


def width(site: Site) -> int:
    """d, from the site's first argument [b, t, d]."""
    return site.args[0].shape[-1]


def word_embeddings(sites: Sites, params: Params) -> Array:
    """The table [vocabulary, d] of the model's word embeddings."""
    (path,) = (path for path in sites if path.split("/")[-1] == "word_embeddings")
    return at(params, path)["embedding"]
