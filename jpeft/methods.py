"""The methods by the names that configurations, plans and saved models know them by."""

from collections.abc import Callable
from typing import NamedTuple

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
    "houlsby": Method(houlsby, 5e-4),
    "lora": Method(lora, 5e-4),
    "parallel": Method(parallel, 5e-4),
    "pfeiffer": Method(pfeiffer, 5e-4),
    "prefix": Method(prefix, 2e-4),
}
