"""A task of your own, ratings whose classes have an order: python examples/own_task.py

or `python -m jpeft.main --config pfeiffer,examples/own_task.py --config.model=minilm`. Plain classification and
regression on CSV, TSV, JSON lines or parquet files need none of this: `--config METHOD,custom`.
"""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.run import config, experiment

WORDS = ("terrible", "poor", "fair", "good", "superb")


class Ratings(jpeft.Task):
    """Stars from 0 to 4."""

    def splits(self, path=None):
        """Draws sentences; yours would be read from `path`, which is `config.data.path`."""
        rng, found = random.Random(0), {}
        for name, size in (("train", 500), ("validation", 100)):
            labels = [rng.randrange(5) for _ in range(size)]
            texts = [f"A {WORDS[i]} {rng.choice(('film', 'book', 'meal', 'song'))}, we thought." for i in labels]
            found[name] = {"text": texts, "label": labels}
        return jpeft.Splits(found, source="drawn")

    def loss(self, logits, labels):
        """Cross entropy with a target that gives some probability to the neighbouring stars."""
        distance = jnp.abs(jnp.arange(self.num_labels)[None] - labels[:, None])
        return -(jax.nn.softmax(-3.0 * distance) * jax.nn.log_softmax(logits)).sum(-1)

    def score(self, logits, labels):
        """How close the answers are: 1 minus the mean distance in units of the scale."""
        return {"closeness": float(1 - np.abs(logits.argmax(1) - labels).mean() / 4)}


def get_task():
    return Ratings("ratings", ("text",), WORDS, metrics=("closeness",), primary="closeness")


def main(workdir="runs/ratings", model="minilm"):
    settings = config.default(__file__, "pfeiffer")
    settings.model, settings.seeds = model, (1,)
    settings.train.update(num_epochs=3, max_length=16, learning_rate=2e-3)
    report = experiment.run(settings, Path(workdir))
    saved, texts = jpeft.load(f"{workdir}/seed_1/model"), ["A superb meal.", "A poor film."]
    stars = jpeft.predict(saved, texts).argmax(1)
    return report["metrics"]["mean"]["closeness"], dict(zip(texts, (WORDS[i] for i in stars), strict=True))


if __name__ == "__main__":
    print(main())
