"""What make_peft_goldens.py and make_adapters_goldens.py share: the base models, the inputs and the files.

A golden file holds, for each method of a peer on one architecture,

    METHOD/trained/NAME   what trains, under the peer's own state-dict name, tensors that it shares stored once
    METHOD/grads/NAME     the gradient of the mean cross entropy with respect to it
    METHOD/inputs/NAME    the model's arguments, and the labels
    METHOD/logits

and the peer's configs are in the json beside it. The frozen weights are in peft_base_<architecture>, once for both
peers. Every tensor that trains is moved by N(0, 0.3) first, because what starts at zero or one hides what it does.
"""

import importlib.metadata
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
ARCHITECTURES = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
}
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
OWN = {"bert": {"num_labels": 3}, "roberta": {"num_labels": 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}}
LENGTHS = (9, 5, 1, 7)


class Peer(NamedTuple):
    """A model with a peer's method in place.

    Attributes:
      model: what is called; what trains is what has `requires_grad`.
      config: the peer's config, as JSON.
      extra: further tensors to store, as METHOD/NAME; taken before what trains is moved.
    """

    model: torch.nn.Module
    config: dict[str, Any]
    extra: dict[str, torch.Tensor]


def make_bases() -> None:
    """Writes peft_base_*: random weights, ten times larger than usual, and a config.json."""
    torch.manual_seed(0)
    for name, (config, model_class) in ARCHITECTURES.items():
        model = model_class(config(**SMALL, **OWN[name]))
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases and LayerNorms start as zeros and ones
                torch.nn.init.normal_(parameter, 1.0 if parameter_name.endswith("LayerNorm.weight") else 0.0, 0.2)
        _write(f"peft_base_{name}", model.state_dict(), json.loads(model.config.to_json_string()))


def base(name: str) -> torch.nn.Module:
    """The base model of an architecture, in evaluation mode."""
    config, model_class = ARCHITECTURES[name]
    stored = json.loads((GOLDEN / f"peft_base_{name}.json").read_text(encoding="utf-8"))
    model = model_class(config.from_dict(stored, attn_implementation="eager"))
    model.load_state_dict(load_file(GOLDEN / f"peft_base_{name}.safetensors"))
    return model.eval()


def make(peer: str, methods: dict[str, Callable[[str], Peer]], full: tuple[str, ...] = ()) -> None:
    """Writes <peer>_<architecture> with what every method computes.

    Args:
      peer: "peft" or "adapters".
      methods: makers of the models by the methods' names; they are given the architecture's.
      full: the methods whose rows have no padding.
    """
    for name in ARCHITECTURES:
        tensors: dict[str, torch.Tensor] = {}
        configs = {}
        for method, maker in methods.items():
            torch.manual_seed(zlib.crc32(f"{name}/{method}".encode()))
            made = maker(name)
            model = made.model.eval()
            inputs = _inputs(model.config, padded=method not in full)
            trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                for parameter in trained.values():
                    parameter.add_(0.3 * torch.randn_like(parameter))
            logits = model(**{key: x for key, x in inputs.items() if key != "labels"}).logits
            torch.nn.functional.cross_entropy(logits, inputs["labels"]).backward()
            parts = {
                "trained": {key: p.detach() for key, p in trained.items()},
                "grads": {key: p.grad for key, p in trained.items()},
                "inputs": inputs,
            }
            tensors |= {f"{method}/{part}/{key}": x for part, held in parts.items() for key, x in held.items()}
            tensors |= {f"{method}/{key}": x for key, x in made.extra.items()}
            tensors[f"{method}/logits"] = logits.detach()
            configs[method] = made.config
            print(f"{peer} {name} {method}: {len(trained)} tensors, logits {logits[0].tolist()}")
        _write(f"{peer}_{name}", tensors, configs, **{peer: importlib.metadata.version(peer)})


def _inputs(config: transformers.PretrainedConfig, padded: bool) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(max(LENGTHS))[None] < lengths).long() if padded else torch.ones(4, max(LENGTHS)).long()
    ids = torch.randint(5, config.vocab_size, mask.shape) * mask + config.pad_token_id * (1 - mask)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, config.num_labels - 1])}
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = (torch.arange(max(LENGTHS))[None] >= lengths // 2).long() * mask
    return inputs


def _write(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], **versions: str) -> None:
    file = GOLDEN / f"{name}.safetensors"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, **versions}
    metadata = {"versions": json.dumps(versions)}  # one key, because safetensors writes several in any order
    save_file({key: x.contiguous().clone() for key, x in tensors.items()}, file, metadata=metadata)
    file.chmod(0o644)  # safetensors leaves its files readable to their owner alone
    text = json.dumps(config, indent=1, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x))
    file.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
