"""The PyTorch side of prediction.py: a `pipeline` of transformers over pairs of sentences, in batches.

Started by prediction.py with the folder of a merged model, a file of pairs, the most tokens of a row, the rows of a
batch and the threads. Answers each line on standard input, "order" or "sorted", with the seconds that all pairs took
and those of the processors, and writes the probabilities [n, labels] of a pass to the file that the line names.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: str, data: str, max_length: str, batch_size: str, threads: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    pairs = json.loads(Path(data).read_text(encoding="utf-8"))
    classify = transformers.pipeline(
        "text-classification", model=folder, top_k=None, truncation=True, max_length=int(max_length)
    )
    names = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]
    rows = [{"text": one, "text_pair": two} for one, two in pairs]
    lengths = [len(ids) for ids in classify.tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"]]
    orders = {"order": list(range(len(rows))), "sorted": sorted(range(len(rows)), key=lambda i: -lengths[i])}

    def answer(order: list[int]) -> np.ndarray:
        found = np.zeros((len(rows), len(names)))
        for i, scores in zip(order, classify([rows[i] for i in order], batch_size=int(batch_size)), strict=True):
            by_name = {score["label"]: score["score"] for score in scores}
            found[i] = [by_name[name] for name in names]
        return found

    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        start = time.perf_counter(), time.process_time()
        found = answer(orders[what])
        print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)
        if rest:
            np.save(rest[0], found)


if __name__ == "__main__":
    main(*sys.argv[1:])
