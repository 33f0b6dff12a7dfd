"""Folders of Hugging Face `peft`, both ways: what jpeft trained opens there, and what peft trained opens here.

    adapter_config.json         the kind of module, its sizes, and where it sits
    adapter_model.safetensors   its tensors and the head's, kernels as [out, in]

LoRA and its relatives, (IA)3, prefixes, prompts and P-tuning, on BERT and RoBERTa. Checked against peft 0.21.2. What
peft has no words for is an error that says so; a merged model (`jpeft.export --format hf`) always opens there.
"""

from jpeft.store.huggingface.format import CONFIG, WEIGHTS, Modules
from jpeft.store.huggingface.reading import read
from jpeft.store.huggingface.writing import write

__all__ = ["CONFIG", "WEIGHTS", "Modules", "read", "write"]
