"""The methods, by their names in configs, plans and saved modules."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jpeft.core.transform import Chain, Transform
from jpeft.transforms.adamix import adamix
from jpeft.transforms.adapterdrop import adapterdrop
from jpeft.transforms.bitfit import bitfit
from jpeft.transforms.dora import dora
from jpeft.transforms.far import far
from jpeft.transforms.fish import fish
from jpeft.transforms.houlsby import houlsby
from jpeft.transforms.ia3 import ia3
from jpeft.transforms.krona import krona
from jpeft.transforms.ladder_side import ladder_side
from jpeft.transforms.layer_norm import layer_norm
from jpeft.transforms.lora import lora, rslora
from jpeft.transforms.magnitude_mask import magnitude_mask
from jpeft.transforms.mam import mam
from jpeft.transforms.p_tuning import p_tuning
from jpeft.transforms.parallel import parallel
from jpeft.transforms.pfeiffer import pfeiffer
from jpeft.transforms.pissa import pissa
from jpeft.transforms.prefix import prefix
from jpeft.transforms.prompt import prompt
from jpeft.transforms.random_mask import random_mask
from jpeft.transforms.said import said
from jpeft.transforms.sparse_adapter import sparse_adapter
from jpeft.transforms.top_k_layers import top_k_layers
from jpeft.transforms.unipelt import unipelt

__all__ = ["METHODS", "MODULES", "RENAMED", "Method", "defaults"]


class Method(NamedTuple):
    """A named method.

    Attributes:
      learning_rate: the default learning rate.
      make: (**options) -> the transform. None if there is none: `full`, `head` and `fishpal`.
      trains_base: whether all base parameters train.
      chooses: whether it chooses the modules of each layer by measuring candidates on data.
    """

    learning_rate: float
    make: Callable[..., Transform | Chain] | None = None
    trains_base: bool = False
    chooses: bool = False


METHODS: dict[str, Method] = {
    "fishpal": Method(5e-4, chooses=True),
    "full": Method(2e-5, trains_base=True),
    "head": Method(1e-3),
    "adamix": Method(5e-4, adamix),
    "adapterdrop": Method(5e-4, adapterdrop),
    "bitfit": Method(1e-3, bitfit),
    "dora": Method(5e-4, dora),
    "far": Method(5e-5, far),
    "fish": Method(1.6e-3, fish),
    "houlsby": Method(5e-4, houlsby),
    "ia3": Method(3e-3, ia3),
    "krona": Method(1e-3, krona),
    "ladder_side": Method(3e-3, ladder_side),
    "layer_norm": Method(1e-3, layer_norm),
    "lora": Method(5e-4, lora),
    "magnitude_mask": Method(1.6e-3, magnitude_mask),
    "mam": Method(1e-4, mam),
    "p_tuning": Method(1e-3, p_tuning),
    "parallel": Method(5e-4, parallel),
    "pfeiffer": Method(5e-4, pfeiffer),
    "pissa": Method(5e-4, pissa),
    "prefix": Method(2e-4, prefix),
    "prompt": Method(5e-3, prompt),
    "random_mask": Method(1.6e-3, random_mask),
    "rslora": Method(2e-4, rslora),
    "said": Method(5e-3, said),
    "sparse_adapter": Method(5e-4, sparse_adapter),
    "top_k_layers": Method(5e-5, top_k_layers),
    "unipelt": Method(5e-4, unipelt),
}

# The methods that can be in a plan and be joined by "+".
MODULES: tuple[str, ...] = tuple(name for name, method in METHODS.items() if method.make is not None)

# Names that may occur in plans and saved modules of earlier versions.
RENAMED = {"adapter": "pfeiffer"}


@functools.cache
def defaults(method: str) -> Mapping[str, Any]:
    """The options of a method with their default values, from its signature; none for `full`, `head` and `fishpal`."""
    make = METHODS[method].make
    known = {} if make is None else inspect.signature(make).parameters
    return MappingProxyType({name: option.default for name, option in known.items()})
