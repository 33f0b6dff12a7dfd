"""The methods by the names that configurations, plans and saved models know them by."""

from collections.abc import Callable
from typing import NamedTuple

from jpeft.selection.existing import bitfit, layer_norm, top_k_layers
from jpeft.selection.far import far
from jpeft.selection.mask import fish, random_mask
from jpeft.transform import Chain, Transform
from jpeft.transforms.adapter import houlsby, parallel, pfeiffer
from jpeft.transforms.lora import lora
from jpeft.transforms.prefix import prefix

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A method's maker, and the learning rate at which it is trained when none is given."""

    make: Callable[..., Transform | Chain]
    learning_rate: float


METHODS: dict[str, Method] = {
    "adapter": Method(pfeiffer, 5e-4),
    "bitfit": Method(bitfit, 1e-3),
    "far": Method(far, 5e-5),
    "fish": Method(fish, 5e-5),
    "houlsby": Method(houlsby, 5e-4),
    "layer_norm": Method(layer_norm, 1e-3),
    "lora": Method(lora, 5e-4),
    "parallel": Method(parallel, 5e-4),
    "pfeiffer": Method(pfeiffer, 5e-4),
    "prefix": Method(prefix, 2e-4),
    "random_mask": Method(random_mask, 5e-5),
    "top_k_layers": Method(top_k_layers, 5e-5),
}
