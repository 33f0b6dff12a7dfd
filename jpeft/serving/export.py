"""Exports trained modules to other libraries' folders, with a model card that says what that changed."""

import os
import shutil
from pathlib import Path

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.core.transform import instances, merge
from jpeft.models import pretrained
from jpeft.report import tables
from jpeft.run.console import Console
from jpeft.serving import card
from jpeft.serving.drift import Drift, measure
from jpeft.store import adapterhub, huggingface, model_folder, onnx, stablehlo
from jpeft.store.modules import Saved, load

__all__ = ["FORMATS", "export", "find_modules"]

FORMATS = {
    "hf": "a plain model with the modules merged, for transformers' AutoModelFor...Classification",
    "peft": "an adapter beside the base model, for peft's PeftModel",
    "adapters": "an adapter beside the base model, for AdapterHub's adapters, plans of several kinds included",
    "stablehlo": "one program for CPU, CUDA and TPU that needs JAX and not jpeft, whatever the modules are",
    "onnx": "one file for ONNX Runtime, which needs neither JAX nor jpeft, for modules that convert",
}
CARD = "README.md"


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
    saved = load(folder)
    console.title(f"exporting {folder} as {form}")
    new = not output.exists()
    try:
        drift = _write(output, form, folder, saved, console)
        description = model_folder.verify(folder)
        files.write_text(output / CARD, card.write(folder, form, description, saved, drift, license))
    except BaseException:
        if new:  # or the same command would be refused
            shutil.rmtree(output, ignore_errors=True)
        raise
    console.say(f"written: {output}")
    return drift


def _write(output: Path, form: str, folder: Path, saved: Saved, console: Console) -> list[Drift]:
    """Writes the format, and returns what `measure` finds."""
    description, kept = model_folder.read(folder)
    if form == "hf":
        _write_merged(output, saved)
    elif form == "stablehlo":
        stablehlo.write(output, saved)
    elif form == "onnx":
        onnx.write(output, saved)
    else:
        modules = huggingface.Modules(description["modules"], kept.get("peft", {}), kept["params"])
        base = card.on_the_hub(description["base"]["name"])
        if form == "peft":
            huggingface.write(output, modules, saved.model.config, base)
        else:
            adapterhub.write(output, modules, saved.model.config, base, saved.labels)
            if card.gated(modules.leaves):
                console.warn(card.PADDING)
    if saved.own_encode:
        console.warn(card.ENCODED)
    return measure(folder, form, output, saved, console)


def find_modules(model: Path, console: Console) -> Path:
    """The folder of modules itself, or that of a workdir's best seed.

    Raises:
      UserError: if it is neither.
    """
    model = Path(os.path.realpath(model))  # what is around a folder is asked for, too
    if (model / model_folder.DESCRIPTION).is_file():
        return model
    if not (model / "report.json").is_file():
        raise UserError(f"--model {model} is neither a folder of trained modules nor the workdir of a finished run")
    report = files.read_record(model / "report.json", tables.REPORT)
    metric = report["primary_metric"]
    found = {row["seed"]: tables.saved(report, row)[metric] for row in report["metrics"]["per_seed"]}
    best = max(found, key=found.__getitem__)
    if len(found) > 1:
        console.say(f"  seed {best} has the best {metric}, {found[best]:.4f}")
    return model / f"seed_{best}" / "model"


def _write_merged(output: Path, saved: Saved) -> None:
    merged = merge(saved.transform, saved.variables["peft"], saved.variables["params"])
    if merged.transform.members:
        names = ", ".join(instances(merged.transform))
        raise UserError(f"{names} cannot be merged into a plain model: what it does depends on the input")
    problem = "multi_label_classification" if saved.kind == "multilabel" else None
    pretrained.save(
        output, saved.model.config, merged.params, labels=saved.labels, tokenizer_from=saved.base, problem=problem
    )
