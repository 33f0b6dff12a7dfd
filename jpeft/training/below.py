"""The layers below the lowest one that trains or is wrapped: computed once for every row, without dropout.

Every step would compute the same there, but for dropout. What enters the lowest site is kept in memory instead of the
tokens, and steps begin with it.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core.errors import UserError
from jpeft.core.hook import apply
from jpeft.core.partition import Partition
from jpeft.core.site import layer_of
from jpeft.core.transform import SHARED, Chain
from jpeft.core.tree import flatten, union
from jpeft.data.batching import Batch, Examples, Hidden, eval_batches
from jpeft.models.bert import Bert, BertConfig
from jpeft.training.compiled import EVAL_BATCH, Compiled

__all__ = ["lowest", "planned_bytes", "with_hidden"]

ABOVE = ("pooler", "classifier")  # the modules that come after all layers
SHARE = 0.5  # of the machine's memory, at most


def lowest(parts: Partition, layers: int) -> int:
    """The lowest layer in which anything trains or is wrapped; `layers` if that is in the head alone.

    Args:
      parts: the variables.
      layers: how many the model has.
    """
    leaves = union(parts.frozen["peft"], parts.trainable["peft"])
    # A method without a site of its own, such as one with shared leaves alone, may act in any layer.
    paths = [path for own in leaves.values() for path in ((set(own) - {SHARED}) or {""})]
    paths += ["/".join(path) for path in flatten(parts.trainable["params"])]
    return min((_layer(path, layers) for path in paths), default=layers)


def _layer(path: str, layers: int) -> int:
    if path.split("/")[0] in ABOVE:
        return layers
    return layer_of(path) or 0


def planned_bytes(config: BertConfig, examples: Examples, layer: int) -> int:
    """The memory that the states of these rows take.

    Raises:
      UserError: if that is more than half of the machine's memory.
    """
    states = examples.size if _first_alone(config, layer) else int(examples.lengths.sum())
    needed = states * config.hidden_size * jnp.dtype(config.dtype).itemsize
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > SHARE * whole:
        raise UserError(
            f"config.train.cache_frozen_layers needs {needed / 1e9:.1f} GB for {examples.size:,} rows, more than half "
            f"of this machine's {whole / 1e9:.1f}: train on fewer rows, or without it"
        )
    return needed


def with_hidden(model: Bert, params: Any, examples: Examples, layer: int, buckets: Sequence[int]) -> Examples:
    """The rows with what enters a layer.

    Args:
      model: the encoder.
      params: its parameters, of which those below the layer matter.
      examples: the rows.
      layer: from `lowest`.
      buckets: padded lengths, the last of which holds every row.
    """

    def below(params: Any, _: Any, batch: Batch) -> jax.Array:
        ids, mask, types = batch[:3]
        variables = {"params": params, "peft": {}}
        return apply(model, Chain(()), variables, ids, mask, types, mask=mask)[1].hidden_states[layer]

    run, alone = Compiled(below, 2), _first_alone(model.config, layer)
    states: list[np.ndarray] = [np.empty(0)] * examples.size
    for batch, rows in eval_batches(examples, EVAL_BATCH, buckets):
        for i, found in zip(rows, np.asarray(run(params, None, batch)), strict=False):
            states[i] = found[: 1 if alone else len(examples.input_ids[i])].copy()
    return examples._replace(hidden=Hidden(tuple(states), layer))


def _first_alone(config: BertConfig, layer: int) -> bool:
    """Whether only the first token is read: by a head for the text, above all layers."""
    return layer == config.num_hidden_layers and not config.by_token
