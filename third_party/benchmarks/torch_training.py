"""The PyTorch side of training.py: LoRA by `peft`, or full fine-tuning, with AdamW.

Started by training.py with a file of rows and the threads. Answers each line on standard input: "random N" or
"grouped N" with the examples a second over N steps of such batches, "evaluate" with those over the evaluation rows,
sorted by length, and "memory" with the most gigabytes that the process had.
"""

import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

BATCH, EVAL_BATCH, MEGABATCH = 16, 32, 50  # the trainer groups within 50 batches
GIGABYTE = 1e6 if sys.platform == "linux" else 1e9


def padded(rows: dict[str, list[Any]], index: list[int]) -> dict[str, torch.Tensor]:
    longest = max(len(rows["ids"][i]) for i in index)

    def fill(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in values])

    return {
        "input_ids": fill([rows["ids"][i] for i in index]),
        "token_type_ids": fill([rows["types"][i] for i in index]),
        "attention_mask": fill([[1] * len(rows["ids"][i]) for i in index]),
        "labels": torch.tensor([rows["labels"][i] for i in index]),
    }


def batches(lengths: list[int], grouped: bool) -> Iterator[list[int]]:
    """Without end. Grouped: shuffled, cut into stretches of 50 batches, each sorted by length."""
    rng = random.Random(0)
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        if grouped:
            size = BATCH * MEGABATCH
            stretches = [order[i : i + size] for i in range(0, len(order), size)]
            order = [i for stretch in stretches for i in sorted(stretch, key=lambda i: -lengths[i])]
        cut = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
        if grouped:
            rng.shuffle(cut)  # or a few steps would see long rows alone
        yield from cut


def main(file: str, threads: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    given = json.loads(Path(file).read_text(encoding="utf-8"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=given["labels"])
    if not given["full"]:
        lora = peft.LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["query", "value"]
        )
        model = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-4, weight_decay=0.1)
    train, dev = given["train"], given["dev"]
    lengths, dev_lengths = ([len(x) for x in rows["ids"]] for rows in (train, dev))
    streams = {kind: batches(lengths, kind == "grouped") for kind in ("random", "grouped")}
    order = sorted(range(len(dev_lengths)), key=lambda i: dev_lengths[i])
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        start = time.perf_counter()
        if what == "memory":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIGABYTE, flush=True)
            continue
        if what == "evaluate":
            model.eval()
            with torch.inference_mode():
                for i in range(0, len(order), EVAL_BATCH):
                    model(**padded(dev, order[i : i + EVAL_BATCH])).logits.numpy()
            count = len(order)
        else:
            model.train()
            steps = int(rest[0])
            for index in itertools.islice(streams[what], steps):
                optimizer.zero_grad(set_to_none=True)
                model(**padded(train, index)).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            count = steps * BATCH
        print(count / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
