"""AutoPEFT's search on 4,000 rows of SST-2 with MiniLM, for docs/choice.md: 30 plans, each on 2,000 rows for one epoch.

    python -m jpeft.search --config configs/search_sst2.py --workdir runs/search_sst2

The plans on the front train as in configs/compare_candidates.py, three epochs with seed 11, at four times the methods'
own rate. Needs pip install 'jpeft[search]'.
"""

from jpeft.run.config import Config
from jpeft.workbench import search


def get_config() -> Config:
    config = search.default("sst2", trials=30)
    config.run.model, config.run.seeds = "minilm", (11,)
    config.run.train.update(num_epochs=3, max_length=128, max_train_examples=4000, learning_rate=2e-3)
    config.search.train.update(num_epochs=1, max_train_examples=2000)
    return config
