"""Checks that AdapterHub's adapters opens what jpeft writes, and jpeft what adapters writes, with the same logits.

    python third_party/parity/check_adapters_folders.py write FOLDER   # where jpeft is installed
    python third_party/parity/check_adapters_folders.py check FOLDER   # in requirements-adapters.txt's environment
    python third_party/parity/check_adapters_folders.py save FOLDER    # there, too
    python third_party/parity/check_adapters_folders.py read FOLDER    # where jpeft is installed

`make parity` runs all four. The base models and inputs are those of the goldens; rows for gates have no padding, which
adapters would average over. Each step prints the largest difference of a logit; the two that compare exit with 1 if one
is above the tolerance.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
ARCHITECTURES = ("bert", "roberta")
TOLERANCE = 2e-5
# What `write` writes: modules with sizes that differ by layer, in some layers only, at every place that there is.
SPECS = {
    "pfeiffer": [("pfeiffer", {"bottleneck": 5, "layers": [1], "scale": 2.0})],
    "pfeiffer_twice": [("pfeiffer", {"targets": "attention_add_norm|ffn_add_norm", "ln_before": True})],
    "pfeiffer_sizes": [
        ("pfeiffer", {"bottleneck": 5, "layers": [0]}),
        ("pfeiffer", {"bottleneck": 3, "layers": [1]}),
    ],
    "houlsby": [("houlsby", {"reduction_factor": 3, "ln_after": True, "learned_scale": True})],
    "houlsby_gate": [("houlsby", {"targets": "attention_add_norm", "gate": True})],
    "parallel": [("parallel", {"bottleneck": 7})],
    "lora": [("lora", {"rank": 3, "alpha": 5.5, "targets": "query|key|intermediate|ffn/output"})],
    "rslora": [("rslora", {"rank": 4, "layers": [1]})],
    "pissa": [("pissa", {"rank": 2})],
    "ia3": [("ia3", {"placement": "before"})],
    "prefix": [("prefix", {"num_virtual_tokens": 3, "mlp_hidden": 4, "layers": [1]})],
    "prefix_flat": [("prefix", {"num_virtual_tokens": 3, "mlp_hidden": None})],
    "prompt": [("prompt", {"num_virtual_tokens": 4, "placement": "states"})],
    "unipelt_gate": [("unipelt", {"num_virtual_tokens": 3, "mlp_hidden": 4, "reduction_factor": 4, "rank": 2})],
    "mam": [("mam", {"num_virtual_tokens": 3, "mlp_hidden": 4, "bottleneck": 4})],
    "plan": [
        ("prefix", {"num_virtual_tokens": 3, "mlp_hidden": 4, "layers": [0]}),
        ("pfeiffer", {"bottleneck": 5, "layers": [1]}),
        ("lora", {"rank": 2, "layers": [1]}),
    ],
}


# The same with a pooler of their own, which is the first layer of a flexible head there; RoBERTa has none.
POOLED = {"pfeiffer_pooler": [("pfeiffer", {"bottleneck": 5})]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "check", "save", "read"])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    return {"write": write, "check": check, "save": save, "read": read}[args.step](args.folder)


def inputs_of(architecture: str, method: str) -> dict[str, np.ndarray]:
    gated = "gate" in method or method.startswith("unipelt")
    stored = load_file(GOLDEN / f"adapters_{architecture}.safetensors")
    start = "unipelt/inputs/" if gated else "lora/inputs/"
    return {k.removeprefix(start): x for k, x in stored.items() if k.startswith(start) and not k.endswith("labels")}


def write(folder: pathlib.Path) -> int:
    import jax
    from check_peft_folders import loaded, logits_of

    import jpeft
    from jpeft.store import adapterhub
    from jpeft.store.huggingface import Modules

    for architecture in ARCHITECTURES:
        model, params = loaded(folder / f"{architecture}.base", architecture)
        sites = jpeft.sites(model, np.ones((1, 2), np.int32))
        for name, entries in {**SPECS, **(POOLED if architecture == "bert" else {})}.items():
            inputs = inputs_of(architecture, name)
            spec = [{"method": method, "options": options} for method, options in entries]
            transform = jpeft.build(spec)
            head = ("classifier", "pooler") if name in POOLED else ("classifier",)
            parts = jpeft.partition(
                transform, params, jpeft.init(transform, jax.random.key(0), sites, params), trains=head
            )
            rng = np.random.default_rng(0)
            moved = jax.tree.map(lambda x, r=rng: np.float32(x + 0.1 * r.normal(size=x.shape)), parts.trainable)
            whole = jpeft.union(parts.frozen["peft"], moved["peft"])
            for leaves, end in ((whole, ""), (jpeft.fold(transform, whole), ".folded")):
                modules = Modules(spec, leaves, moved["params"])
                out = folder / f"{architecture}.{name}{end}"
                adapterhub.write(out, modules, model.config, str((folder / f"{architecture}.base").absolute()))
                save_file({**inputs, "logits": logits_of(model, params, modules, inputs)}, out / "expected.safetensors")
                print(f"{out.name}: written")
    return 0


def flexible(architecture: str) -> Any:
    """The base model of the goldens in the class whose heads are flexible, without a head."""
    import adapters
    import goldens

    base = goldens.base(architecture)
    model = adapters.BertAdapterModel(base.config)
    missing, surplus = model.bert.load_state_dict(base.bert.state_dict(), strict=False)
    assert not surplus, surplus
    assert all("prefix" in name or "prompt" in name for name in missing), missing
    return model.eval()


def check(folder: pathlib.Path) -> int:
    import adapters
    import goldens
    import torch

    worst = 0.0
    for out in sorted(path.parent for path in folder.glob("*/expected.safetensors")):
        if out.name.startswith("adapters."):
            continue
        expected = load_file(out / "expected.safetensors")
        logits = expected.pop("logits")
        architecture, name = out.name.split(".")[:2]
        if name in POOLED:
            model = flexible(architecture)
        else:
            model = goldens.base(architecture)
            adapters.init(model)
        model.load_adapter(str(out), set_active=True, use_safetensors=True)
        model.eval()
        with torch.no_grad():
            theirs = model(**{k: torch.from_numpy(x) for k, x in expected.items()}).logits.numpy()
        difference = float(np.abs(theirs - logits).max())
        print(f"{out.name}: adapters {difference:.1e}")
        worst = max(worst, difference)
    return int(not 0 < worst <= TOLERANCE)


def save(folder: pathlib.Path) -> int:
    from unittest import mock

    import torch
    from adapters import loading
    from make_adapters_goldens import CONFIGS, build
    from safetensors.torch import save_file as save_tensors

    def clones(tensors: dict[str, torch.Tensor], file: str) -> None:
        """Tensors that are one, or have two names, as safetensors takes them: each by itself."""
        save_tensors({name: x.contiguous().clone() for name, x in tensors.items()}, file)

    for architecture in ARCHITECTURES:
        for method in (*CONFIGS, *(POOLED if architecture == "bert" else ())):
            torch.manual_seed(0)
            inputs = inputs_of(architecture, method)
            if method in POOLED:
                model = flexible(architecture)
                model.add_adapter("peer", config="seq_bn", set_active=True)
                model.add_classification_head("peer", num_labels=3, layers=2, use_pooler=False)
                model.train_adapter("peer")
                model.eval()
            else:
                model = build(method, architecture).model.eval()
            out = folder / f"adapters.{architecture}.{method}"
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
                with mock.patch.object(loading, "save_file", clones):
                    model.save_adapter(str(out), "peer", use_safetensors=True)
                logits = model(**{k: torch.from_numpy(x) for k, x in inputs.items()}).logits.numpy()
            save_file({**inputs, "logits": logits}, out / "expected.safetensors")
            print(f"{out.name}: saved by adapters")
    return 0


def read(folder: pathlib.Path) -> int:
    from check_peft_folders import loaded, logits_of

    from jpeft.store import adapterhub

    worst = 0.0
    for out in sorted(folder.glob("adapters.*.*")):
        _, architecture, _ = out.name.split(".")
        model, params = loaded(folder / f"{architecture}.base", architecture)
        expected = load_file(out / "expected.safetensors")
        logits = expected.pop("logits")
        ours = logits_of(model, params, adapterhub.read(out, model.config), expected)
        difference = float(np.abs(ours - logits).max())
        print(f"{out.name}: jpeft {difference:.1e}")
        worst = max(worst, difference)
    return int(not 0 < worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
