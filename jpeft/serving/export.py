"""Exports trained modules to other libraries' folders, and measures on the evaluation split what that changed."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.core.transform import Chain, instances, merge
from jpeft.core.tree import flatten, union
from jpeft.data.batching import Batch
from jpeft.models import Bert, BertConfig, pretrained
from jpeft.plans.plan import build
from jpeft.report import tables
from jpeft.run import experiment, workdir
from jpeft.run.console import Console
from jpeft.store import adapterhub, huggingface, onnx, stablehlo
from jpeft.store import modules as modules_on_disk
from jpeft.store.modules import Saved
from jpeft.training import step
from jpeft.training.compiled import Compiled
from jpeft.training.loop import evaluate

__all__ = ["DTYPES", "FORMATS", "Drift", "export", "find_modules"]

DTYPES = ("float32", "bfloat16")
FORMATS = {
    "hf": "a plain model with the modules merged, for transformers' AutoModelForSequenceClassification",
    "peft": "an adapter beside the base model, for peft's PeftModel",
    "adapters": "an adapter beside the base model, for AdapterHub's adapters, plans of several kinds included",
    "stablehlo": "one program for CPU, CUDA and TPU that needs JAX and not jpeft, whatever the modules are",
    "onnx": "one file for ONNX Runtime, which needs neither JAX nor jpeft, whatever the modules are",
}
LIBRARY = {"hf": "transformers", "peft": "peft", "adapters": "adapters", "stablehlo": "jax", "onnx": "onnx"}
CARD = "README.md"
PADDING = "the gates of adapters also average over padding, so rows with padding have other logits there"


class Drift(NamedTuple):
    """How the exported model differs from the run's own float32 logits on the evaluation split.

    Attributes:
      dtype: that the exported model computes in.
      largest: difference of a logit.
      changed: rows with another answer; of a regression, None.
      rows: of the split.
    """

    dtype: str
    largest: float
    changed: int | None
    rows: int


def export(model: Path, form: str, output: Path, console: Console, license: str = "unknown") -> list[Drift]:
    """Writes a folder that another library opens, with a model card.

    Args:
      model: a `seed_<n>/model` folder, or a workdir, whose best seed is taken.
      form: one of `FORMATS`.
      output: made if need be, and empty.
      console: shows what is going on.
      license: for the model card.

    Returns:
      What changed on the evaluation split, by dtype; nothing if its data cannot be found.

    Raises:
      UserError: if the folder is none of ours, the format is unknown, or cannot express the modules.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form!r} is unknown: {nearest(form, FORMATS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: choose a new folder")
    folder = find_modules(model, console)
    saved = modules_on_disk.load(folder)
    description, kept = modules_on_disk.read(folder)
    console.title(f"exporting {folder} as {form}")
    if form == "hf":
        _write_merged(output, saved)
    elif form == "stablehlo":
        stablehlo.write(output, saved)
    elif form == "onnx":
        onnx.write(output, saved)
    else:
        modules = huggingface.Modules(description["modules"], kept.get("peft", {}), kept["params"])
        base = _on_the_hub(description["base"]["name"])
        if form == "peft":
            huggingface.write(output, modules, saved.model.config, base)
        else:
            adapterhub.write(output, modules, saved.model.config, base, saved.labels)
            if _gated(modules.leaves):
                console.warn(PADDING)
    drift = _drift(folder, form, output, saved, console)
    files.write_text(output / CARD, _card(folder, form, description, saved, drift, license))
    console.say(f"written: {output}")
    return drift


def _gated(leaves: Mapping[str, Any]) -> bool:
    return any("gate" in path for path in flatten(leaves))


def _on_the_hub(base: str) -> str:
    """The name by which others find the base model."""
    return {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}.get(base, base)


def find_modules(model: Path, console: Console) -> Path:
    """The folder of modules itself, or that of a workdir's best seed.

    Raises:
      UserError: if it is neither.
    """
    model = model.resolve()  # what is around a folder is asked for, too
    if (model / modules_on_disk.DESCRIPTION).is_file():
        return model
    if not (model / "report.json").is_file():
        raise UserError(f"--model {model} is neither a folder of trained modules nor the workdir of a finished run")
    report = files.read_record(model / "report.json", tables.REPORT)
    metric = report["primary_metric"]
    best = max(report["metrics"]["per_seed"], key=lambda row: row["last"][metric])
    if len(report["metrics"]["per_seed"]) > 1:
        console.say(f"  seed {best['seed']} has the best {metric}, {best['last'][metric]:.4f}")
    return model / f"seed_{best['seed']}" / "model"


def _write_merged(output: Path, saved: Saved) -> None:
    merged = merge(saved.transform, saved.variables["peft"], saved.variables["params"])
    if merged.transform.members:
        names = ", ".join(instances(merged.transform))
        raise UserError(f"{names} cannot be merged into a plain model: what it does depends on the input")
    pretrained.save(output, saved.model.config, merged.params, labels=saved.labels, tokenizer_from=saved.base)


def _drift(folder: Path, form: str, output: Path, saved: Saved, console: Console) -> list[Drift]:
    run, predictions = folder.parents[1], folder.parent / experiment.PREDICTIONS
    try:
        config = workdir.read_config(run)
        data, _, inputs = experiment.load(config, Console(quiet=True))
        workdir.check(files.read_record(run / workdir.INPUTS, workdir.INPUTS_KIND), inputs, run)
        expected = np.asarray(files.read_leaves(predictions)["logits"])
    except UserError as error:
        console.warn(f"what changed on the evaluation split was not measured: {error}")
        return []
    found = []
    for dtype, opened in READERS[form](output, saved).items():
        logits = evaluate(opened, {}, {}, data.dev, data.eval_buckets)
        changed = int((logits.argmax(1) != expected.argmax(1)).sum()) if saved.labels else None
        found.append(Drift(dtype, float(np.abs(logits - expected).max()), changed, len(expected)))
        of = "" if changed is None else f", {changed} of {len(expected):,} answers"
        console.say(f"  in {dtype}, the exported model differs by at most {found[-1].largest:.1e} in a logit{of}")
    return found


Opened = dict[str, Callable[[Any, Any, Batch], Any]]  # by dtype, what gives the logits of a batch


def _read_merged(output: Path, saved: Saved) -> Opened:
    loaded = pretrained.load(output, num_labels=len(saved.labels) or 1, key=jax.random.key(0))
    return _opened(saved, build([]), {"params": loaded.params, "peft": {}})


def _read_peft(output: Path, saved: Saved) -> Opened:
    return _with_modules(saved, huggingface.read(output, saved.model.config))


def _read_adapters(output: Path, saved: Saved) -> Opened:
    return _with_modules(saved, adapterhub.read(output, saved.model.config))


def _with_modules(saved: Saved, modules: huggingface.Modules) -> Opened:
    params = union(saved.variables["params"], modules.params)
    return _opened(saved, build(modules.spec), {"params": params, "peft": jax.tree.map(jnp.asarray, modules.leaves)})


def _opened(saved: Saved, transform: Chain, variables: dict[str, Any]) -> Opened:
    def of(dtype: str) -> Callable[[Any, Any, Batch], Any]:
        model = Bert(BertConfig(**{**vars(saved.model.config), "dtype": dtype}))
        run = Compiled(step.eval_step(model, transform), 2)
        return lambda _, __, batch: run(variables, {"params": {}, "peft": {}}, batch)

    return {dtype: of(dtype) for dtype in DTYPES}


def _read_program(library: Any, output: Path, saved: Saved) -> Opened:
    program, dtype = library.read(output), saved.model.config.dtype
    return {dtype: lambda _, __, batch: program(batch.input_ids, batch.attention_mask, batch.token_type_ids)}


READERS: Mapping[str, Callable[[Path, Saved], Opened]]
READERS = {"hf": _read_merged, "peft": _read_peft, "adapters": _read_adapters}
READERS |= {"stablehlo": partial(_read_program, stablehlo), "onnx": partial(_read_program, onnx)}
USE = {
    "hf": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={num_labels})
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained({base!r})""",
    "adapters": """import adapters
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={num_labels})
adapters.init(model)
model.load_adapter("this folder", set_active=True, use_safetensors=True)
tokenizer = AutoTokenizer.from_pretrained({base!r})""",
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


def _card(
    folder: Path, form: str, description: Mapping[str, Any], saved: Saved, drift: list[Drift], license: str
) -> str:
    """The model card: what it is, how it was made, how well it does, what the export changed, how to use it."""
    base, labels = _on_the_hub(description["base"]["name"]), saved.labels
    methods = ", ".join(f"{entry['method']} {json.dumps(entry['options'])}" for entry in description["modules"])
    lines = [
        "---", f"license: {json.dumps(license)}", f"base_model: {json.dumps(base)}",
        "pipeline_tag: text-classification", f"library_name: {LIBRARY[form]}", "---", "",
        f"# {saved.task}, {base}", "",
        f"Trained with jpeft {description['jpeft']}. Modules: {methods or 'none'}.",
        f"Inputs: {'pairs of sentences' if saved.num_texts == 2 else 'sentences'}, cut to {saved.max_length} tokens.",
        f"Labels: {', '.join(labels)}." if labels else "It answers with a number.",
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
            lines.append(f"| {own} | {' | '.join(f'{x:.4f}' for x in row['last'].values())} |")
        lines += ["", f"On {read['examples']['evaluation']:,} rows of {read['split']}.", ""]
        if read["command"]:
            lines += ["Made by", "", f"    {read['command']}", ""]
    if drift:
        lines += ["What the export changed, on the same rows, against the run's own logits in float32:", ""]
        lines += ["| computed in | largest difference of a logit | other answers |", "| --- | ---: | ---: |"]
        lines += [f"| {d.dtype} | {d.largest:.1e} | {'-' if d.changed is None else d.changed} |" for d in drift]
        lines.append("")
    if form == "adapters" and _gated(saved.variables["peft"]):
        lines += [f"Note: {PADDING}.", ""]
    example = '["a sentence"]' + (', ["and another"]' if saved.num_texts == 2 else "")
    use = USE[form].format(base=base, num_labels=len(labels) or 1, example=example, max_length=saved.max_length)
    return "\n".join([*lines, "```python", use, "```", ""])
