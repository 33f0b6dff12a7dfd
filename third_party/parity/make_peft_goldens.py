"""Writes tests/golden/peft_*: what Hugging Face peft computes on small random models, and its gradients.

    python third_party/parity/make_peft_goldens.py

Environment: requirements-peft.txt beside this file. It also writes the base models, which make_adapters_goldens.py
reads, so it goes first. What the files hold is in goldens.py; PiSSA's also have `start/NAME`, the A and B that peft
took out of the base weights.
"""

import functools

import goldens
import peft

WIDE = ["query", "value", "intermediate.dense", "output.dense"]  # the last one is attention.output.dense, too
FACTORS = {"r": 3, "lora_alpha": 5, "target_modules": WIDE}
MLP, LSTM = "MLP", "LSTM"
CONFIGS = {
    "lora": functools.partial(peft.LoraConfig, **FACTORS),
    "rslora": functools.partial(peft.LoraConfig, **FACTORS, use_rslora=True),
    "dora": functools.partial(peft.LoraConfig, **FACTORS, use_dora=True),
    "pissa": functools.partial(peft.LoraConfig, **FACTORS, init_lora_weights="pissa"),
    # peft's own choice for BERT, "output.dense", reaches the attention's projection as well as the feed-forward's.
    "ia3": functools.partial(
        peft.IA3Config, target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "ia3_inner": functools.partial(
        peft.IA3Config, target_modules=["key", "value", "intermediate.dense"], feedforward_modules=[]
    ),
    "prefix": functools.partial(
        peft.PrefixTuningConfig, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
    ),
    "prefix_flat": functools.partial(peft.PrefixTuningConfig, num_virtual_tokens=4),
    "prompt": functools.partial(peft.PromptTuningConfig, num_virtual_tokens=4),
    "p_tuning_lstm": functools.partial(
        peft.PromptEncoderConfig,
        num_virtual_tokens=4,
        encoder_reparameterization_type=LSTM,
        encoder_hidden_size=6,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    ),
    "p_tuning_mlp": functools.partial(
        peft.PromptEncoderConfig, num_virtual_tokens=4, encoder_reparameterization_type=MLP, encoder_hidden_size=6
    ),
}


def main() -> None:
    goldens.make_bases()
    goldens.make("peft", {method: functools.partial(build, method) for method in CONFIGS})


def build(method: str, architecture: str) -> goldens.Peer:
    model = peft.get_peft_model(goldens.base(architecture), CONFIGS[method](task_type="SEQ_CLS"))
    extra = {}
    if method == "pissa":
        extra = {f"start/{key}": p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}
    config = {k: v for k, v in model.peft_config["default"].to_dict().items() if v not in (None, {}, [])}
    return goldens.Peer(model, config, extra)


if __name__ == "__main__":
    main()
