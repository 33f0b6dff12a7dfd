"""What a longer or a faster race of FishPAL's candidates would have seen: held-out losses by step and learning rate.

    JPEFT_GLUE_DIR=... python third_party/benchmarks/race.py --task synthetic --seed 11

Each candidate trains alone in all layers, from the run's own head on, as in the race, for `--looks` times `--every`
steps, at multiples of the methods' own rates; with `--fitted`, from a head that is fitted on frozen features. The run
that is meant is that of `configs/compare_candidates.py`: MiniLM, at most 4,000 rows, three epochs. docs/choice.md holds
the losses against what the candidates score in the end.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np

from jpeft.data import batching
from jpeft.run import config as configs
from jpeft.run import experiment, loading, measuring, trials
from jpeft.run import seed as seeds
from jpeft.run.console import Console


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="synthetic")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 4], help="multiples of the methods' own")
    parser.add_argument("--candidates", nargs="+", default=["lora", "pfeiffer", "prefix"])
    parser.add_argument("--fitted", action="store_true", help="begin with a fitted head")
    parser.add_argument("--every", type=int, default=14, help="steps between two looks")
    parser.add_argument("--looks", type=int, default=3)
    args = parser.parse_args()
    quiet = Console(quiet=True)
    config = configs.default(args.task, "fishpal")
    config.model, config.seeds, config.fishpal.candidates = "minilm", (args.seed,), tuple(args.candidates)
    config.train.update(num_epochs=3, max_length=128, max_train_examples=4000)
    experiment.use_compilation_cache()
    data, base, _ = loading.load(config, quiet)
    own = configs.learning_rate(config)
    print(f"{args.task}, seed {args.seed}: held-out losses every {args.every} steps, and their standard error")
    for factor in args.rates:
        config.train.learning_rate = factor * own
        seed = seeds.begin(config, args.seed, data, base, Path(), quiet)
        ready = measuring.prepare(seed, 2 * trials.RACE_HELD)
        held = set(ready.rows[ready.a.size :].tolist())
        train = batching.take(seed.data.train, [i for i in range(seed.data.train.size) if i not in held])
        for name, entry in configs.candidates(config).items():
            params = ready.params if args.fitted else seed.base.params
            run = trials.tried(seed, entry, params, train, ready.b, args.every, False)
            looks = [reached.losses for reached in itertools.islice(run, args.looks)]
            error = np.std(looks[-1], ddof=1) / math.sqrt(looks[-1].size)
            print(f"  {factor:g} x, {name}: {', '.join(f'{x.mean():.4f}' for x in looks)} +- {error:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
