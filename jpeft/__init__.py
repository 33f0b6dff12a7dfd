"""Parameter-efficient fine-tuning for JAX and Flax.

import jpeft

sites = jpeft.sites(model, x)                                   # where a module can sit
method = jpeft.chain(jpeft.lora(rank=8), jpeft.prefix(10))      # what to put there
leaves = jpeft.init(method, key, sites, params)                 # what trains; params stay as they are
y = jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
"""

from jpeft.core.errors import UserError
from jpeft.core.files import read_leaves, write_leaves
from jpeft.core.hook import apply
from jpeft.core.partition import Partition, partition, penalty
from jpeft.core.quantise import quantise
from jpeft.core.site import Site, find, layers, sites
from jpeft.core.summary import Summary, summary
from jpeft.core.transform import (
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
from jpeft.core.tree import union
from jpeft.data.task import Splits, Task
from jpeft.importance.arithmetic import dare, task_arithmetic, ties
from jpeft.importance.average import fisher_average
from jpeft.importance.fisher import fisher
from jpeft.importance.masks import packed, read_mask, top, write_mask
from jpeft.plans import fishpal
from jpeft.plans.plan import Entry, Plan, build
from jpeft.serving.multi_task import MultiTask
from jpeft.serving.prediction import predict
from jpeft.store.modules import Saved, load
from jpeft.training.draws import dropout_key
from jpeft.transforms.adamix import adamix
from jpeft.transforms.adapterdrop import adapterdrop
from jpeft.transforms.bitfit import bitfit
from jpeft.transforms.dora import dora
from jpeft.transforms.far import far
from jpeft.transforms.fish import fish
from jpeft.transforms.houlsby import houlsby
from jpeft.transforms.ia3 import ia3
from jpeft.transforms.iti import Probes, activations, iti, probe
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
from jpeft.transforms.registry import METHODS
from jpeft.transforms.said import said
from jpeft.transforms.sparse_adapter import sparse_adapter
from jpeft.transforms.top_k_layers import top_k_layers
from jpeft.transforms.unipelt import unipelt
from jpeft.version import __version__

__all__ = [
    "METHODS",
    "Chain",
    "Context",
    "Entry",
    "Merged",
    "MultiTask",
    "Partition",
    "Plan",
    "Probes",
    "Saved",
    "Setting",
    "Site",
    "Splits",
    "Summary",
    "Task",
    "Transform",
    "UserError",
    "__version__",
    "activations",
    "adamix",
    "adapterdrop",
    "apply",
    "bitfit",
    "build",
    "chain",
    "dare",
    "dora",
    "dropout_key",
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
    "iti",
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
    "partition",
    "penalty",
    "pfeiffer",
    "pissa",
    "predict",
    "prefix",
    "prepare",
    "probe",
    "prompt",
    "quantise",
    "random_mask",
    "read_leaves",
    "read_mask",
    "rslora",
    "said",
    "sites",
    "sparse_adapter",
    "summary",
    "task_arithmetic",
    "ties",
    "top",
    "top_k_layers",
    "union",
    "unipelt",
    "write_leaves",
    "write_mask",
]
