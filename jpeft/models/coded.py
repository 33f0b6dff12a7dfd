"""The parameters of an encoder with its kernels in codes, for modules to train on."""

from collections.abc import Mapping
from typing import Any

import jax

from jpeft.core.quantise import quantise
from jpeft.core.site import sites
from jpeft.models.bert import Bert, BertConfig

__all__ = ["coded"]


def coded(config: BertConfig, params: Mapping[str, Any], kind: str | None, exceptions: str | None = None) -> Any:
    """The parameters with the kernels of the encoder's layers quantised; embeddings, pooler and head stay as they are.

    Args:
      config: the shape of the model.
      params: of `Bert(config)`, with or without its head.
      kind: see `jpeft.quantise`; None returns the parameters as they are.
      exceptions: pattern of layers that stay as they are, too.

    Raises:
      UserError: as `jpeft.quantise`.
    """
    if kind is None:
        return params
    where = sites(Bert(config), jax.ShapeDtypeStruct((1, 2), "int32"))
    return quantise(params, where, kind, exceptions=exceptions)
