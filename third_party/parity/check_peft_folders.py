"""Checks that Hugging Face peft opens what jpeft writes, and jpeft what peft writes, with the same logits.

    python third_party/parity/check_peft_folders.py write FOLDER   # where jpeft is installed
    python third_party/parity/check_peft_folders.py check FOLDER   # in requirements-peft.txt's environment
    python third_party/parity/check_peft_folders.py save FOLDER    # there, too
    python third_party/parity/check_peft_folders.py read FOLDER    # where jpeft is installed

The base models and inputs are those of the goldens. Each step prints the largest difference of a logit; the two that
compare exit with 1 if one is above the tolerance.
"""

import argparse
import pathlib
import shutil
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
ARCHITECTURES = {"bert": 3, "roberta": 2}  # labels
TOLERANCE = 2e-5
# What `write` writes: modules with sizes that differ by site, in some layers only, at every place that there is.
SPECS = {
    "lora": ("lora", {"rank": 3, "targets": "query|value|output|intermediate"}),
    "lora_patterns": ("lora", {"rank": 2, "rank_pattern": {"layer_0/.*/query": 5}, "alpha_pattern": {"value": 3.0}}),
    "rslora": ("rslora", {"rank": 4, "layers": [1]}),
    "dora": ("dora", {"rank": 3, "targets": "query|ffn/output"}),
    "pissa": ("pissa", {"rank": 2}),
    "ia3": ("ia3", {}),
    "ia3_before": ("ia3", {"placement": "before"}),
    "prompt": ("prompt", {"num_virtual_tokens": 4}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 4, "hidden": 6}),
    "prefix": ("prefix", {"num_virtual_tokens": 4, "mlp_hidden": 6, "shift_positions": True}),
    "prefix_flat": ("prefix", {"num_virtual_tokens": 5, "mlp_hidden": None, "shift_positions": True}),
}
BESIDE_WEIGHTS = ("lora", "rslora", "dora", "ia3", "ia3_inner")
SAVED = (*BESIDE_WEIGHTS, "prompt", "p_tuning_lstm", "p_tuning_mlp", "prefix", "prefix_flat")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "check", "save", "read"])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    return {"write": write, "check": check, "save": save, "read": read}[args.step](args.folder)


def inputs_of(architecture: str) -> dict[str, np.ndarray]:
    stored = load_file(GOLDEN / f"peft_{architecture}.safetensors")
    start = "lora/inputs/"
    return {k.removeprefix(start): x for k, x in stored.items() if k.startswith(start) and not k.endswith("labels")}


def loaded(folder: pathlib.Path, architecture: str):
    """The base model here, from a folder made of the golden."""
    import jax

    from jpeft.models import Bert, pretrained

    folder.mkdir(parents=True, exist_ok=True)
    for end, name in ((".json", "config.json"), (".safetensors", "model.safetensors")):
        shutil.copyfile(GOLDEN / f"peft_base_{architecture}{end}", folder / name)
    base = pretrained.load(folder, num_labels=ARCHITECTURES[architecture], key=jax.random.key(0))
    return Bert(base.config), base.params


def logits_of(model, params, modules, inputs) -> np.ndarray:
    import jpeft

    variables = {"params": jpeft.union(params, modules.params), "peft": modules.leaves}
    arguments = {name: x.astype(np.int32) for name, x in inputs.items()}
    mask = arguments["attention_mask"]
    return np.asarray(jpeft.apply(model, jpeft.build(modules.spec), variables, mask=mask, **arguments)[0])


def write(folder: pathlib.Path) -> int:
    import jax

    import jpeft
    from jpeft.store import huggingface

    for architecture in ARCHITECTURES:
        model, params = loaded(folder / f"{architecture}.base", architecture)
        inputs = inputs_of(architecture)
        sites = jpeft.sites(model, np.ones((1, 2), np.int32))
        for name, (method, options) in SPECS.items():
            spec = [{"method": method, "options": options}]
            transform = jpeft.build(spec)
            parts = jpeft.partition(
                transform, params, jpeft.init(transform, jax.random.key(0), sites, params), trains="classifier"
            )
            rng = np.random.default_rng(0)
            moved = jax.tree.map(lambda x, r=rng: np.float32(x + 0.1 * r.normal(size=x.shape)), parts.trainable)
            leaves = jpeft.fold(transform, jpeft.union(parts.frozen["peft"], moved["peft"]))
            modules = huggingface.Modules(spec, leaves, moved["params"])
            out = folder / f"{architecture}.{name}"
            huggingface.write(out, modules, model.config, str((folder / f"{architecture}.base").absolute()))
            save_file({**inputs, "logits": logits_of(model, params, modules, inputs)}, out / "expected.safetensors")
            print(f"{out.name}: written")
    return 0


def check(folder: pathlib.Path) -> int:
    import goldens
    import peft
    import torch

    worst = 0.0
    for out in sorted(path.parent for path in folder.glob("*/expected.safetensors")):
        if out.name.startswith("peft."):
            continue
        expected = load_file(out / "expected.safetensors")
        logits = expected.pop("logits")
        model = peft.PeftModel.from_pretrained(goldens.base(out.name.split(".")[0]), out).eval()
        with torch.no_grad():
            theirs = model(**{k: torch.from_numpy(x) for k, x in expected.items()}).logits.numpy()
        difference = float(np.abs(theirs - logits).max())
        print(f"{out.name}: peft {difference:.1e}")
        worst = max(worst, difference)
    return int(not 0 < worst <= TOLERANCE)


def save(folder: pathlib.Path) -> int:
    import torch
    from make_peft_goldens import build

    for architecture in ARCHITECTURES:
        inputs = inputs_of(architecture)
        for method in SAVED:
            torch.manual_seed(0)
            model = build(method, architecture).model.eval()
            out = folder / f"peft.{architecture}.{method}"
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                model.save_pretrained(out)
                logits = model(**{k: torch.from_numpy(x) for k, x in inputs.items()}).logits.numpy()
            save_file({**inputs, "logits": logits}, out / "expected.safetensors")
            print(f"{out.name}: saved by peft")
    return 0


def read(folder: pathlib.Path) -> int:
    from jpeft.store import huggingface

    worst = 0.0
    for out in sorted(folder.glob("peft.*.*")):
        _, architecture, _ = out.name.split(".")
        model, params = loaded(folder / f"{architecture}.base", architecture)
        expected = load_file(out / "expected.safetensors")
        logits = expected.pop("logits")
        ours = logits_of(model, params, huggingface.read(out, model.config), expected)
        difference = float(np.abs(ours - logits).max())
        print(f"{out.name}: jpeft {difference:.1e}")
        worst = max(worst, difference)
    return int(not 0 < worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
