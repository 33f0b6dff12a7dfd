"""The plans that no other beats in both score and size."""

import numpy as np
import pytest

from jpeft.report import front as fronts
from jpeft.report.front import Point


def brute(points):
    """By definition: no other is as good in both and better in one."""

    def beats(a, b):
        return a.score >= b.score and a.percent <= b.percent and (a.score, a.percent) != (b.score, b.percent)

    return {p.number for p in points if not any(beats(other, p) for other in points)}


@pytest.mark.parametrize("values", [3, 5, 1000], ids=["many ties", "some ties", "none"])
def test_the_front_is_what_no_other_point_beats(values):
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        points = [Point(i, {}, *map(int, rng.integers(values, size=2)), 1.0) for i in range(n)]
        found = fronts.front(points)
        assert {point.number for point in found} == brute(points)
        assert [p.percent for p in found] == sorted(p.percent for p in found)
    assert fronts.front([]) == []
