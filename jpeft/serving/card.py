"""The model card of an exported model."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.core import files
from jpeft.core.tree import flatten
from jpeft.report import tables
from jpeft.serving.drift import Drift
from jpeft.store import bases, model_folder
from jpeft.store.modules import Saved
from jpeft.transforms.registry import defaults

__all__ = ["PADDING", "gated", "on_the_hub", "write"]

BESIDE = ("peft", "adapters")  # a base that is loaded from elsewhere
LIBRARY = {"hf": "transformers", "peft": "peft", "adapters": "adapters", "stablehlo": "jax", "onnx": "onnx"}
PADDING = "the gates of adapters also average over padding, so rows with padding have other logits there"
ENCODED = "the task of this model made token ids of texts in a way of its own, which is no part of the export"
ABOUT = {
    "multilabel": ", each of them or not where its logit is above 0",
    "tagging": ", one for the first token of each word",
}
USE = {
    "hf": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder", model_max_length={max_length})""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({base!r}, {fields})
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained({base!r}, model_max_length={max_length})""",
    "adapters": """import adapters
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({base!r}, {fields})
adapters.init(model)
model.load_adapter("this folder", set_active=True, use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained({base!r}, model_max_length={max_length})""",
    # Of a pooler that trained: only flexible heads have a place for it.
    "adapters with a pooler": """import adapters
from transformers import AutoTokenizer

model = adapters.BertAdapterModel.from_pretrained({base!r})
model.load_adapter("this folder", set_active=True, use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained({base!r}, model_max_length={max_length})""",
    "stablehlo": """from pathlib import Path

import numpy as np
from jax import export
from safetensors.flax import load_file
from transformers import AutoTokenizer

model = export.deserialize(bytearray(Path("this folder/model.stablehlo").read_bytes()))
weights = load_file("this folder/weights.safetensors")
tokenizer = AutoTokenizer.from_pretrained("this folder")
rows = tokenizer({example}, padding=True, truncation=True, max_length={max_length}, return_tensors="np")
ids, mask = (np.int32(rows[name]) for name in ("input_ids", "attention_mask"))
types = np.int32(rows["token_type_ids"]) if "token_type_ids" in rows else np.zeros_like(ids)
logits = model.call(weights, ids, mask, types)""",
    "onnx": """import numpy as np
import onnxruntime
from transformers import AutoTokenizer

model = onnxruntime.InferenceSession("this folder/model.onnx")
tokenizer = AutoTokenizer.from_pretrained("this folder")
rows = tokenizer({example}, padding=True, truncation=True, max_length={max_length}, return_tensors="np")
ids, mask = (np.int32(rows[name]) for name in ("input_ids", "attention_mask"))
types = np.int32(rows["token_type_ids"]) if "token_type_ids" in rows else np.zeros_like(ids)
(logits,) = model.run(None, {{"input_ids": ids, "attention_mask": mask, "token_type_ids": types}})""",
}


def gated(leaves: Mapping[str, Any]) -> bool:
    """Whether any of these modules has a gate."""
    return any("gate" in path for path in flatten(leaves))


def _fields(saved: Saved) -> str:
    """What a base that is loaded from elsewhere must be told: how to answer, and what its answers are called."""
    if not saved.labels:
        return 'num_labels=1, problem_type="regression"'
    names = dict(enumerate(saved.labels))
    fields = f"id2label={names!r}, label2id={ {name: i for i, name in names.items()}!r}"
    problem = {"multilabel": "multi_label_classification", "classification": "single_label_classification"}
    return fields + (f', problem_type="{problem[saved.kind]}"' if saved.kind in problem else "")


def on_the_hub(base: str) -> str:
    """The name by which others find the base model."""
    return {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}.get(base, base)


def _method(entry: Mapping[str, Any]) -> str:
    """A method with all of its options that are set: "lora, rank 8, alpha 8, targets query|value"."""
    options = {**defaults(entry["method"]), **entry["options"]}
    given = {name: x for name, x in options.items() if x is not None}
    told = [f"{name} {x if isinstance(x, str | int | float) else json.dumps(x)}" for name, x in given.items()]
    return ", ".join([entry["method"], *told])


def _without_places(command: str) -> str:
    """A command line without the folders of the machine that it ran on, which are nobody else's business."""
    words = []
    for word in shlex.split(command):
        name, equals, value = word.partition("=")
        place = value if equals else name
        words.append(name * bool(equals) + equals + (Path(place).name if place.startswith("/") else place))
    return shlex.join(words)


def write(
    folder: Path, form: str, description: Mapping[str, Any], saved: Saved, drift: Sequence[Drift], license: str
) -> str:
    """The page: what the model is, how it was made, how well it does, what the export changed, how to use it.

    Args:
      folder: of the modules, maybe in the workdir of their run.
      form: that they are exported as, a key of `USE`.
      description: of the modules.
      saved: what `folder` holds.
      drift: what the export changed.
      license: of the model.
    """
    base, labels = on_the_hub(description["base"]["name"]), saved.labels
    methods = "; ".join(map(_method, description["modules"]))
    tagging = saved.kind == "tagging"
    inputs = "words" if tagging else "pairs of sentences" if saved.num_texts == 2 else "sentences"
    lines = [
        "---", f"license: {json.dumps(license)}", f"base_model: {json.dumps(base)}",
        f"pipeline_tag: {'token' if tagging else 'text'}-classification", f"library_name: {LIBRARY[form]}", "---", "",
        f"# {saved.task}, {base}", "",
        f"Trained with jpeft {description['jpeft']}. Modules: {methods or 'none'}.",
        f"Inputs: {inputs}, in training cut to {saved.max_length} tokens.",
        f"Labels: {', '.join(labels)}{ABOUT.get(saved.kind, '')}." if labels else "It answers with a number.",
        "",
    ]  # fmt: skip
    report = folder.parents[1] / "report.json"
    if report.is_file():
        read = files.read_record(report, tables.REPORT)
        lines += [
            f"| seed | {' | '.join(read['metrics']['mean'])} |",
            "| --- |" + " ---: |" * len(read["metrics"]["mean"]),
        ]
        for row in read["metrics"]["per_seed"]:
            own = f"{row['seed']}, this model" if f"seed_{row['seed']}" == folder.parent.name else str(row["seed"])
            lines.append(f"| {own} | {' | '.join(f'{x:.4f}' for x in tables.saved(read, row).values())} |")
        told = ", by which the best epoch was chosen" if read["recipe"].get("export") == "best" else ""
        lines += ["", f"On {read['examples']['evaluation']:,} rows of {read['split']}{told}.", ""]
        if read["command"]:
            lines += ["Made by", "", f"    {_without_places(read['command'])}", ""]
    if drift:
        lines += ["What the export changed, on the same rows, against the run's own logits in float32:", ""]
        lines += ["| computed in | largest difference of a logit | other answers |", "| --- | ---: | ---: |"]
        lines += [f"| {d.dtype} | {d.largest:.1e} | {'-' if d.changed is None else d.changed} |" for d in drift]
        lines.append("")
    kind, _ = bases.codes(description)
    if kind is not None:
        here = "is put on the weights as they were before" if form in BESIDE else "has these kernels, dequantised"
        lines += [f"Note: trained on a base with kernels quantised as {kind}; what is here {here}.", ""]
    if saved.own_encode:
        lines += [f"Note: {ENCODED}.", ""]
    if form == "adapters" and gated(saved.variables["peft"]):
        lines += [f"Note: {PADDING}.", ""]
    example = '["a sentence"]' + (', ["and another"]' if saved.num_texts == 2 else "")
    example = '[["some", "words"]], is_split_into_words=True' if tagging else example
    if form == "adapters" and "pooler" in model_folder.read(folder)[1]["params"]:
        form = "adapters with a pooler"
    use = USE[form].format(base=base, fields=_fields(saved), example=example, max_length=saved.max_length)
    if tagging:
        use = use.replace("ForSequenceClassification", "ForTokenClassification")
        # As in training: RoBERTa's tokenizer tells words apart by the space before them.
        use = re.sub(r"(AutoTokenizer\.from_pretrained\([^)]*)\)", r"\1, add_prefix_space=True)", use)
    return "\n".join([*lines, "```python", use, "```", ""])
