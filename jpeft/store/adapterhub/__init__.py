"""Folders of AdapterHub's `adapters`, both ways: what jpeft trained opens there, and what that trained opens here.

    adapter_config.json      which method, its sizes, and the layers that it leaves out; several methods are a union
    adapter.safetensors      its tensors, kernels as [out, in]
    head_config.json         the head's kind and labels
    model_head.safetensors   the head's tensors

Bottleneck adapters, LoRA, (IA)3, prefixes and prompts, and any choice of them by layer, on BERT and RoBERTa. The names
of the tensors do not tell a parallel adapter from a sequential one: only the config does. The format is that of
adapters 1.3.0 (`save_adapter` with `use_safetensors=True`), learnt from its code and from what it wrote itself
(third_party/parity/make_adapters_goldens.py); the pickles that it writes otherwise are never loaded.
"""

from jpeft.store.adapterhub.format import CLASSES, CONFIG, HEAD_CONFIG, HEAD_WEIGHTS, WEIGHTS
from jpeft.store.adapterhub.reading import read
from jpeft.store.adapterhub.writing import write

__all__ = ["CLASSES", "CONFIG", "HEAD_CONFIG", "HEAD_WEIGHTS", "WEIGHTS", "read", "write"]
