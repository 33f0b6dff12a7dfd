"""What peft's folders are made of."""

from typing import Any, NamedTuple

from jpeft.core.transform import Leaves
from jpeft.plans.plan import Spec

__all__ = ["BODY", "CONFIG", "CORE", "EMBEDDING", "VIRTUAL", "WEIGHTS", "Modules"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BODY, VIRTUAL = "base_model.model.", "base_model."  # before the names of modules; peft nests prompts less deeply
EMBEDDING = "embeddings/inputs"  # our site of virtual tokens, and of positions
CORE = "encoder/layer_{}/attention/core"  # of prefixes


class Modules(NamedTuple):
    """Trained modules, as `jpeft.build` and `jpeft.apply` take them.

    Attributes:
      spec: what to build the transform from.
      leaves: of that transform.
      params: base parameters that trained, the head among them; they replace those of the base.
    """

    spec: Spec
    leaves: Leaves
    params: dict[str, Any]
