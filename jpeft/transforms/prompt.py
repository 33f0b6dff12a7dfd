"""Prompt tuning: trained vectors before the text (Lester et al. 2021, arXiv:2104.08691)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError, nearest
from jpeft.core.leaves import init_sites, wide
from jpeft.core.site import Site, Sites
from jpeft.core.transform import Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.inputs import before_states, before_words, width, word_embeddings
from jpeft.transforms.parts.linear import sizes
from jpeft.transforms.parts.places import find_encoders, find_inputs

__all__ = ["check_ids", "prompt"]

PLACES = {
    "words": ("embeddings/inputs", find_inputs, before_words),
    "states": ("encoder", find_encoders, before_states),
}


def prompt(
    num_virtual_tokens: int = 10,
    start_from: str = "vocabulary",
    token_ids: Sequence[int] | None = None,
    placement: str = "words",
) -> Transform:
    """P trained vectors before the text; a BERT head then reads the first of them instead of [CLS], as in the peers.

    At inference each row has P more tokens. It cannot be merged.

    Args:
      num_virtual_tokens: P. AdapterHub's default is 10; with more than the text has, it hardly learns in a short run.
      start_from: "vocabulary" starts from rows of the word embeddings, those of `token_ids` or random ones;
        "random" from N(0, 1).
      token_ids: the P rows to start from; None samples them. Only with "vocabulary".
      placement: "words" puts the vectors before the word vectors, before positions, token types and LayerNorm are
        applied (Hugging Face peft); "states" after the LayerNorm, without positions (AdapterHub).

    Returns:
      A transform with leaves {path: {"embedding": [P, d]}}.

    Raises:
      UserError: if an option is unknown, out of range or does not fit the others; in `init`, if the model has no such
        site, or no parameters are given although the vectors start from them.
    """
    sizes(num_virtual_tokens=num_virtual_tokens)
    for name, value, known in (
        ("start_from", start_from, ("vocabulary", "random")),
        ("placement", placement, PLACES),
    ):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown: {nearest(value, known)}")
    if token_ids is not None and (start_from != "vocabulary" or len(token_ids) != num_virtual_tokens):
        raise UserError(f"token_ids must be {num_virtual_tokens} ids, and start_from 'vocabulary': got {token_ids}")
    target, find, lengthen = PLACES[placement]

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        if params is None and start_from == "vocabulary":
            raise UserError("prompt starts from the model's word embeddings: pass `params` to init")

        def make(key: Array, site: Site) -> dict[str, Array]:
            if params is None or start_from == "random":
                return {"embedding": jax.random.normal(key, (num_virtual_tokens, width(site)))}
            table = word_embeddings(sites, params)
            rows = jax.random.randint(key, (num_virtual_tokens,), 0, len(table))
            if token_ids is not None:
                check_ids(token_ids, table)
                rows = jnp.asarray(token_ids)
            return {"embedding": wide(table[rows])}

        return init_sites(key, find(sites, target), make)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> tuple[Array, ...]:
        return call(*lengthen(leaves["embedding"], args))

    return Transform("prompt", init, wrap)


def check_ids(token_ids: Sequence[int], table: Array) -> None:
    """Raises UserError for the first id that is not a row of the table."""
    for i in token_ids:
        if not 0 <= i < len(table):
            raise UserError(f"token id {i} is not in the vocabulary of {len(table)}")
