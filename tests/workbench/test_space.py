"""A space of plans: its points, how many there are, and which come first."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from workbench.spaces import LAYERS, SPACE

from jpeft.plans import plan as plans
from jpeft.plans.plan import Entry
from jpeft.workbench import space as spaces


def test_a_point_is_a_plan():
    space = ConfigDict(SPACE)
    assert spaces.choices(space, "bits", LAYERS) == {"serial": 4, "flat": 2, "layer_0": 2, "layer_1": 2}
    both = [Entry("prefix", {"num_virtual_tokens": 3, "mlp_hidden": None}), Entry("pfeiffer", {"bottleneck": 2})]
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 1, "layer_0": 0, "layer_1": 1}) == {1: both}
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 0}) == {0: both[1:], 1: both[1:]}
    assert spaces.plan_of(space, LAYERS, {"serial": 0, "flat": 0, "layer_0": 1, "layer_1": 1}) == {}
    assert spaces.plan_of(space, LAYERS, {"serial": 2, "flat": 1, "layer_0": 0, "layer_1": 0}) == {}


def test_all_ranks_have_the_scale_of_the_default():
    def entry(method, **options):
        candidate = {"method": method, "option": "rank", "sizes": (2, 32), "options": options}
        ((found,),) = spaces.plan_of(ConfigDict({"a": candidate}), 1, {"a": 1}).values()
        return found.options

    assert entry("lora") == {"rank": 32, "alpha": 64.0}  # 16 for rank 8
    assert entry("rslora") == {"rank": 32, "alpha": 32.0}  # over the root of the rank
    assert entry("lora", alpha=3.0) == {"rank": 32, "alpha": 3.0}


@pytest.mark.parametrize("layers", spaces.LAYERS)
@pytest.mark.parametrize("sizes", [(0, 1, 2, 4), (1, 2)])
def test_the_size_of_a_space_is_the_number_of_its_plans(layers, sizes):
    space = ConfigDict({**SPACE, "serial": {**SPACE["serial"], "sizes": sizes}})
    names = spaces.choices(space, layers, LAYERS)
    points = (dict(zip(names, point, strict=True)) for point in np.ndindex(*names.values()))
    found = {spaces.key(plan) for point in points if (plan := spaces.plan_of(space, LAYERS, point))}
    assert len(found) == spaces.size(space, layers, LAYERS)


def test_uniform_plans_of_one_candidate_come_first():
    space = ConfigDict(SPACE)
    first = [spaces.plan_of(space, LAYERS, point) for point in spaces.middles(space, "bits", LAYERS)]
    flat = Entry("prefix", {"num_virtual_tokens": 3, "mlp_hidden": None})
    assert first == [plans.uniform(flat, LAYERS), plans.uniform(Entry("pfeiffer", {"bottleneck": 2}), LAYERS)]
    space.flat.sizes = (3, 5)  # always there, so an adapter is never alone
    assert spaces.middles(space, "all", LAYERS) == [{"flat": 1, "serial": 0}]
