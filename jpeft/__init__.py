"""Parameter-efficient fine-tuning for JAX and Flax.

import jpeft

sites = jpeft.sites(model, x)                                   # where a module can sit
method = jpeft.chain(jpeft.lora(rank=8), jpeft.prefix(10))      # what to put there
leaves = jpeft.init(method, key, sites, params)                 # what trains; params stay as they are
y = jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
"""

from jpeft.errors import UserError
from jpeft.fisher import fisher
from jpeft.hook import apply
from jpeft.methods import METHODS
from jpeft.plan import Entry, Plan, build
from jpeft.saved import Saved, load, predict
from jpeft.selection import fishpal
from jpeft.site import Site, find, layers, sites
from jpeft.summary import Summary, summary
from jpeft.transform import (
    Chain,
    Context,
    Merged,
    Setting,
    Transform,
    chain,
    fold,
    init,
    instances,
    merge,
    prepare,
)
from jpeft.transforms.adapter import houlsby, parallel, pfeiffer
from jpeft.transforms.lora import lora
from jpeft.transforms.prefix import prefix
from jpeft.version import __version__

__all__ = [
    "METHODS",
    "Chain",
    "Context",
    "Entry",
    "Merged",
    "Plan",
    "Saved",
    "Setting",
    "Site",
    "Summary",
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
    "prepare",
    "sites",
    "summary",
]
