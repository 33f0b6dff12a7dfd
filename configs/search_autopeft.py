"""AutoPEFT's search on MRPC with MiniLM: adapters, prefixes and their layers, for the best score at every size.

    python -m jpeft.search --config configs/search_autopeft.py --workdir runs/search

40 plans train for two epochs; those on the front train for ten, with three seeds that the search did not see. The space
is that of Zhou et al. (2023, arXiv:2301.12132); its sizes end at half of MiniLM's width. For other modules, copy this
file: a candidate is any method that plans can put into single layers. Needs pip install 'jpeft[search]'.
"""

from jpeft.run.config import Config
from jpeft.workbench import search


def get_config(task: str = "mrpc") -> Config:
    config = search.default(task, trials=40)
    config.run.model = "minilm"
    config.run.seeds = (11, 22, 88)
    config.search.train.num_epochs = 2
    return config
