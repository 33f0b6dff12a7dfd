"""Every criterion on a tiny run: what it costs, what it reads, and the plan that comes of it."""

import json

import numpy as np
import pytest

from jpeft.plans import plan as plans
from jpeft.run import criteria, experiment
from jpeft.run.config import CRITERIA
from jpeft.run.console import Console


def run(config, workdir):
    return experiment.run(config, workdir, Console(quiet=True))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_chooses_and_says_what_it_cost(tiny_config, tmp_path, criterion):
    config = tiny_config("fishpal", num_epochs=1, max_length=8)
    config.fishpal.criterion = criterion
    report = run(config, tmp_path)
    found = json.loads((tmp_path / "seed_11" / "choice.json").read_text())
    scores = {int(layer): row for layer, row in found["scores"].items()}
    assert list(scores) == [0, 1]
    assert all(list(row) == list(config.fishpal.candidates) for row in scores.values())
    assert np.isfinite([value for row in scores.values() for value in row.values()]).all()
    chosen = plans.read(str(tmp_path / "seed_11" / "plan.json"))
    assert {layer: entries[0].method for layer, entries in chosen.items()} == {
        layer: max(row, key=row.get) for layer, row in scores.items()
    }
    assert report["choice"]["criterion"] == criterion
    assert (report["choice"]["passes"] > 0) == (criterion not in ("random", "size", "magnitude", "depth"))
    page = (tmp_path / "report.md").read_text()
    assert f"Chosen by `{criterion}`" in page
    assert "](choice.png)" in page


def test_the_config_knows_all_criteria():
    assert tuple(criteria.CRITERIA) == CRITERIA
