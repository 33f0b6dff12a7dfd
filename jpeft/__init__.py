"""Parameter-efficient fine-tuning for JAX and Flax.

import jpeft

sites = jpeft.sites(model, x)                                   # where a module can sit
method = jpeft.chain(jpeft.lora(rank=8), jpeft.prefix(10))      # what to put there
leaves = jpeft.init(method, key, sites, params)                 # what trains; params stay as they are
y = jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
"""

from jpeft.average import fisher_average
from jpeft.errors import UserError
from jpeft.fisher import fisher
from jpeft.hook import apply
from jpeft.methods import METHODS
from jpeft.plan import Entry, Plan, build
from jpeft.saved import Saved, load, predict
from jpeft.selection import fishpal
from jpeft.selection.existing import bitfit, layer_norm, top_k_layers
from jpeft.selection.far import far
from jpeft.selection.mask import fish, magnitude_mask, random_mask
from jpeft.selection.sparse import packed, read_mask, top, write_mask
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
    "adamix",
    "adapterdrop",
    "apply",
    "bitfit",
    "build",
    "chain",
    "dora",
    "far",
    "find",
    "fish",
    "fisher",
    "fisher_average",
    "fishpal",
    "fold",
    "houlsby",
    "ia3",
    "init",
    "instances",
    "krona",
    "ladder_side",
    "layer_norm",
    "layers",
    "load",
    "lora",
    "magnitude_mask",
    "mam",
    "merge",
    "p_tuning",
    "packed",
    "parallel",
    "pfeiffer",
    "pissa",
    "predict",
    "prefix",
    "prepare",
    "prompt",
    "random_mask",
    "read_mask",
    "rslora",
    "said",
    "sites",
    "sparse_adapter",
    "summary",
    "top",
    "top_k_layers",
    "unipelt",
    "write_mask",
]
