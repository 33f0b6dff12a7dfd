"""Checks that PyTorch's transformers reads what jpeft saves.

    python third_party/parity/check_saved_folder.py write FOLDER   # where jpeft is installed
    python third_party/parity/check_saved_folder.py check FOLDER   # in requirements-transformers.txt's environment

`write` loads each encoder golden and, where its package is installed, MiniLM; saves it with `jpeft.models.pretrained`
into FOLDER/<name>, and with a head for each token into FOLDER/<name>_words; and stores inputs and jpeft's logits there.
`check` opens each with AutoModelForSequenceClassification or AutoModelForTokenClassification, prints the largest
difference, and exits with 1 if one is above the tolerance.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
TOLERANCE = 2e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "check"])
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    return write(args.folder) if args.step == "write" else check(args.folder)


def write(folder: pathlib.Path) -> int:
    import jax

    from jpeft.core.errors import UserError
    from jpeft.models import pretrained
    from jpeft.models.bert import Bert

    for golden in sorted(GOLDEN.glob("encoder_*.safetensors")):
        name = golden.stem.removeprefix("encoder_")
        tensors = load_file(golden)
        parts = {group: {} for group in ("weights", "inputs", "outputs")}
        for key, x in tensors.items():
            group, _, rest = key.partition("/")
            parts[group][rest] = x
        num_labels = parts["outputs"]["logits"].shape[-1]
        source: str | pathlib.Path = "minilm"
        if name != "minilm":
            source = folder / f"{name}.source"
            source.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(golden.with_suffix(".json"), source / "config.json")
            save_file(parts["weights"], source / "model.safetensors", metadata={"format": "pt"})
        try:
            model = pretrained.load(source, num_labels=num_labels, key=jax.random.key(0))
        except UserError as e:
            print(f"{name}: skipped, {e}")
            continue
        if name == "minilm":
            head = {"kernel": parts["weights"]["classifier.weight"].T, "bias": parts["weights"]["classifier.bias"]}
            model = model._replace(params={**model.params, "classifier": head})
        labels = tuple(f"class {i}" for i in range(num_labels))
        tokenizer = model.folder if name == "minilm" else None
        kernel = np.random.default_rng(0).normal(size=(model.config.hidden_size, num_labels)).astype(np.float32)
        head = {"kernel": kernel / 5, "bias": np.linspace(-1, 1, num_labels, dtype=np.float32)}
        body = {group: x for group, x in model.params.items() if group not in ("classifier", "pooler")}
        words = dataclasses.replace(model.config, by_token=True), {**body, "classifier": head}
        for out, (config, params) in ((name, (model.config, model.params)), (f"{name}_words", words)):
            logits, _ = Bert(config).apply({"params": params}, **parts["inputs"])
            pretrained.save(folder / out, config, params, labels=labels, tokenizer_from=tokenizer)
            save_file({**parts["inputs"], "logits": np.asarray(logits)}, folder / out / "expected.safetensors")
            off = (
                "" if config.by_token else f", {np.abs(logits - parts['outputs']['logits']).max():.1e} from its golden"
            )
            print(f"{out}: saved{off}")
    return 0


def check(folder: pathlib.Path) -> int:
    import torch
    import transformers

    worst = 0.0
    for saved in sorted(path.parent for path in folder.glob("*/expected.safetensors")):
        (architecture,) = json.loads((saved / "config.json").read_text())["architectures"]
        kind = "Token" if "Token" in architecture else "Sequence"
        opens = getattr(transformers, f"AutoModelFor{kind}Classification")
        model, report = opens.from_pretrained(saved, output_loading_info=True)
        faults = {fault: names for fault, names in report.items() if names}
        inputs = load_file(saved / "expected.safetensors")
        logits = inputs.pop("logits")
        with torch.no_grad():
            theirs = model.eval()(**{k: torch.from_numpy(x) for k, x in inputs.items()}).logits.numpy()
        difference = float(np.abs(theirs - logits).max()) if not faults else float("inf")
        print(f"{saved.name}: {difference:.1e}, labels {list(model.config.id2label.values())} {faults or ''}")
        if (saved / "tokenizer.json").exists():
            print(f"  tokenizer: {transformers.AutoTokenizer.from_pretrained(saved)('jpeft').input_ids}")
        worst = max(worst, difference)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
