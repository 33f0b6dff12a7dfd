"""Parameter-efficient fine-tuning for JAX and Flax.

import jpeft

sites = jpeft.sites(model, x)                                   # where a module can sit
method = jpeft.chain(jpeft.lora(rank=8), jpeft.prefix(10))      # what to put there
leaves = jpeft.init(method, key, sites, params)                 # what trains; params stay as they are
y = jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
"""

from jpeft.errors import UserError
from jpeft.fisher import fisher
from jpeft.plan import Entry, Plan, build
from jpeft.saved import Saved, load, predict
from jpeft.selection import fishpal
from jpeft.transform import (
    Chain,
    Context,
    Merged,
    Site,
    Transform,
    apply,
    chain,
    find,
    fold,
    init,
    instances,
    layers,
    merge,
    sites,
)
from jpeft.transforms import METHODS, houlsby, lora, parallel, pfeiffer, prefix
from jpeft.version import __version__

__all__ = [
    "METHODS",
    "Chain",
    "Context",
    "Entry",
    "Merged",
    "Plan",
    "Saved",
    "Site",
    "Transform",
    "UserError",
    "__version__",
    "apply",
    "build",
    "chain",
    "find",
    "fisher",
    "fishpal",
    "fold",
    "houlsby",
    "init",
    "instances",
    "layers",
    "load",
    "lora",
    "merge",
    "parallel",
    "pfeiffer",
    "predict",
    "prefix",
    "sites",
]
