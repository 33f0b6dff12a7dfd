"""The PyTorch side of fisher.py: the empirical Fisher information as FISH computes it, one example after the other.

Started by fisher.py with the folder of a model, a file of examples and the number of threads. Answers each line on
standard input, "padded" or "natural", with the seconds that all examples took; "check" with a path writes the result
there.
"""

import sys
import time

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification


def main(folder: str, data: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, attn_implementation="sdpa").eval()
    arrays = np.load(data)
    ids, mask, types, labels = (torch.from_numpy(arrays[k]).long() for k in ("ids", "mask", "types", "labels"))

    def fisher(natural: bool) -> dict[str, torch.Tensor]:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(len(ids)):
            length = int(mask[i].sum()) if natural else ids.shape[1]
            row = slice(i, i + 1)
            model.zero_grad()
            out = model(input_ids=ids[row, :length], attention_mask=mask[row, :length],
                        token_type_ids=types[row, :length], labels=labels[row])  # fmt: skip
            out.loss.backward()
            for name, p in model.named_parameters():
                total[name] += p.grad.square()
        return {name: x / len(ids) for name, x in total.items()}

    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        start = time.perf_counter()
        found = fisher(what == "natural")
        if rest:
            np.savez(rest[0], **{name: x.numpy() for name, x in found.items()})
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
