"""Writes tests/golden/adapters_*: what AdapterHub's adapters computes on small random models, and its gradients.

    python third_party/parity/make_adapters_goldens.py

Environment: requirements-adapters.txt beside this file. The base models are those that make_peft_goldens.py writes.
What the files hold is in goldens.py. UniPELT is there twice: on rows without padding, and as "unipelt_padded" on rows
with it, which its gates average over.
"""

import functools

import adapters
import goldens

PREFIX = adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6)
SEQUENTIAL = adapters.SeqBnConfig(reduction_factor=4)
LORA = adapters.LoRAConfig(r=3, alpha=5)
UNIPELT = adapters.UniPELTConfig(PREFIX, SEQUENTIAL, LORA)
CONFIGS = {
    "seq_bn": SEQUENTIAL,
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "seq_bn_norms": SEQUENTIAL.replace(ln_before=True, ln_after=True, scaling=2.0),
    "prefix_tuning": PREFIX,
    "prefix_tuning_flat": PREFIX.replace(flat=True),
    "prompt_tuning": adapters.PromptTuningConfig(prompt_length=4),
    "lora": LORA.replace(intermediate_lora=True, output_lora=True),
    "ia3": adapters.IA3Config(),
    "mam": adapters.MAMConfig(PREFIX, adapters.ParBnConfig(reduction_factor=4)),
    "unipelt": UNIPELT,
    "unipelt_padded": UNIPELT,
}


def main() -> None:
    methods = {method: functools.partial(build, method) for method in CONFIGS}
    goldens.make("adapters", methods, full=("unipelt",))


def build(method: str, architecture: str) -> goldens.Peer:
    model = goldens.base(architecture)
    adapters.init(model)
    model.add_adapter("peer", config=CONFIGS[method])
    model.train_adapter("peer")
    return goldens.Peer(model, CONFIGS[method].to_dict(), {})


if __name__ == "__main__":
    main()
