"""Any method on any task of GLUE, at its own learning rate.

    python -m jpeft.main --config configs/glue.py:dora,mrpc --workdir runs/dora_mrpc
    python -m jpeft.main --config configs/glue.py:dora,mrpc,demo          # two CPU cores, no network

AdamW, batch 16, warm-up 6 %, linear decay, 10 epochs, weight decay 0.1: the recipe of the FishPAL thesis, which has
adapters at 1e-4 (configs/adapter_mrpc.py), not at 5e-4. `full`, `head`, `far`
and `top_k_layers` train by the common recipe of BERT (3 epochs, warm-up 10 %, weight decay 0.01), `fish` and its
controls by that of the FISH mask repository (7 epochs, no weight decay). Several methods are joined with "+":
`houlsby+layer_norm`.

Published on MRPC, each with the recipe of its source. bert-base-uncased, F1: AdaMix 92.4 and BitFit 90.4 (the AdaMix
repository), UniPELT 90.94 as APL and 90.28 as AP (its tables). roberta-base, accuracy: AdapterDrop 88.5 with 0.3 M
parameters and 88.4 with 0.9 M (microsoft/LoRA's table).
"""

from jpeft.run.glue import get_config

__all__ = ["get_config"]
