"""FishPAL as it comes, beside each of its candidates in all layers, on six tasks with MiniLM.

    python -m jpeft.compare --config configs/compare_candidates.py --cells docs/results/candidates --workdir runs/study

At most 4,000 training rows, three epochs, each method at its own learning rate. Tasks: all of them, or one
(compare_candidates.py:mrpc).
"""

from jpeft.run.config import Config
from jpeft.workbench import compare

METHODS = ("lora", "pfeiffer", "prefix", "fishpal")
TASKS = ("mrpc", "stsb", "cola", "sst2", "mnli", "synthetic")


def get_config(task: str = "") -> Config:
    grid = compare.default(METHODS, tasks=(task,) if task else TASKS, seeds=(11, 22, 88))
    grid.run.model = "minilm"
    grid.run.train.update(num_epochs=3, max_length=128, max_train_examples=4000)
    return grid
