"""FishPAL on MNLI, with the recipe and seeds of the thesis."""

from ml_collections import ConfigDict

from jpeft import config as c


def get_config(variant: str = "") -> ConfigDict:
    config = c.default(task="mnli", method="fishpal")
    config.seeds = (11, 22, 88)
    return c.variant(config, variant)
