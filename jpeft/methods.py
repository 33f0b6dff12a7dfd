"""The methods by the names that configurations, plans and saved models know them by."""

from collections.abc import Callable
from typing import NamedTuple

from jpeft.selection.existing import bitfit, layer_norm, top_k_layers
from jpeft.selection.far import far
from jpeft.selection.mask import fish, magnitude_mask, random_mask
from jpeft.transform import Chain, Transform
from jpeft.transforms.adamix import adamix
from jpeft.transforms.adapter import houlsby, parallel, pfeiffer
from jpeft.transforms.adapterdrop import adapterdrop
from jpeft.transforms.dora import dora
from jpeft.transforms.hybrid import mam, unipelt
from jpeft.transforms.ia3 import ia3
from jpeft.transforms.krona import krona
from jpeft.transforms.ladder_side import ladder_side
from jpeft.transforms.lora import lora, rslora
from jpeft.transforms.p_tuning import p_tuning
from jpeft.transforms.pissa import pissa
from jpeft.transforms.prefix import prefix
from jpeft.transforms.prompt import prompt
from jpeft.transforms.said import said
from jpeft.transforms.sparse_adapter import sparse_adapter

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A method's maker, and the learning rate at which it is trained when none is given."""

    make: Callable[..., Transform | Chain]
    learning_rate: float


METHODS: dict[str, Method] = {
    "adamix": Method(adamix, 5e-4),
    "adapter": Method(pfeiffer, 5e-4),
    "adapterdrop": Method(adapterdrop, 5e-4),
    "bitfit": Method(bitfit, 1e-3),
    "dora": Method(dora, 5e-4),
    "far": Method(far, 5e-5),
    "fish": Method(fish, 5e-5),
    "houlsby": Method(houlsby, 5e-4),
    "ia3": Method(ia3, 3e-3),
    "krona": Method(krona, 1e-3),
    "ladder_side": Method(ladder_side, 3e-3),
    "layer_norm": Method(layer_norm, 1e-3),
    "lora": Method(lora, 5e-4),
    "magnitude_mask": Method(magnitude_mask, 5e-5),
    "mam": Method(mam, 5e-4),
    "p_tuning": Method(p_tuning, 1e-3),
    "parallel": Method(parallel, 5e-4),
    "pfeiffer": Method(pfeiffer, 5e-4),
    "pissa": Method(pissa, 5e-4),
    "prefix": Method(prefix, 2e-4),
    "prompt": Method(prompt, 5e-3),
    "random_mask": Method(random_mask, 5e-5),
    "rslora": Method(rslora, 2e-4),
    "said": Method(said, 5e-3),
    "sparse_adapter": Method(sparse_adapter, 5e-4),
    "top_k_layers": Method(top_k_layers, 5e-5),
    "unipelt": Method(unipelt, 5e-4),
}
