"""Scores along an axis."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from jpeft.data.tasks import TASKS
from jpeft.report import drawings, series
from jpeft.report.comparison import Outcome
from jpeft.report.series import Point

LABELS = np.array([0, 1] * 50)


def outcome(variant, seed, right, trainable=1.0, task="sst2"):
    predictions = np.where(np.arange(100) < right, LABELS, 1 - LABELS)
    return Outcome(TASKS[task], variant, seed, predictions, LABELS, trainable, 0.5)


def test_points_are_by_place_and_hold_all_seeds():
    runs = [outcome("lora 8", 1, 80), outcome("lora 2", 1, 70), outcome("lora 8", 2, 90), outcome("other", 1, 10)]
    found = series.series(runs, {"LoRA": {"lora 8": 8, "lora 2": 2, "lora 4": 4}, "none": {"gone": 1}})
    assert found == {"sst2": {"LoRA": [Point(2.0, (0.7,)), Point(8.0, (0.8, 0.9))]}}
    assert found["sst2"]["LoRA"][1].mean == pytest.approx(0.85)


def test_without_a_place_it_is_the_share_that_trains():
    runs = [outcome("a", 1, 80, trainable=2.0), outcome("b", 1, 70, trainable=0.5)]
    found = series.series(runs, {"size": {"a": None, "b": None}})
    assert [point.x for point in found["sst2"]["size"]] == [0.5, 2.0]


def test_the_range_around_the_best_ends_at_a_gap():
    means = [0.80, 0.70, 0.795, 0.8, 0.791, 0.5, 0.8]
    points = [Point(float(x), (mean,)) for x, mean in enumerate(means)]
    assert series.within(points) == (0.0, 0.0)  # the first of equals
    assert series.within(points[1:]) == (2.0, 4.0)
    assert series.within(points[1:], near=1.0) == (1.0, 6.0)


def test_the_first_that_reaches_a_score():
    points = [Point(1.0, (0.5, 0.7)), Point(2.0, (0.65,)), Point(4.0, (0.6,))]
    assert series.first(points, 0.6) == 1.0
    assert series.first(points, 0.62) == 2.0
    assert series.first(points, 0.9) is None


def test_the_table_names_the_best_its_range_and_what_reaches_the_reference():
    runs = [outcome("s 1", 1, 60), outcome("s 10", 1, 84), outcome("s 100", 1, 85)]
    found = series.series(runs, {"SAID": {"s 1": 1, "s 10": 10, "s 100": 100}})
    head, rows = series.table(found, {"sst2": 0.9})
    assert head[-1] == "first at 90 % of the reference"
    assert rows == [("sst2", "SAID", "85.0", "100", "10 to 100", "10")]
    assert series.table(found, {"sst2": 0.99})[1][0][-1] == "none"
    assert series.table(found, {})[1][0][-1] == "-"


def test_the_picture_is_written(tmp_path):
    runs = [
        outcome(f"s {x}", seed, 60 + 5 * x + seed, task=t) for x in (1, 2) for seed in (1, 2) for t in ("sst2", "qqp")
    ]
    found = series.series(runs, {"a": {"s 1": 1, "s 2": 2}, "b": {"s 2": 0}})
    names, half = {"sst2": "accuracy", "qqp": "f1"}, {"sst2": 0.5, "qqp": 0.5}
    drawings.png(tmp_path / "curves.png", *series.drawing(found, "size", names, {"sst2": 0.9}, half))
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_more_curves_than_colours_are_divided_among_panels_of_one_scale():
    found = {task: {f"m{i}": [Point(1.0, (0.5,)), Point(4.0, (0.1 * i,))] for i in range(9)} for task in ("a", "b")}
    half = dict.fromkeys(found, 0.5)
    width, height, draw = series.drawing(found, "rate", dict.fromkeys(found, "accuracy"), {}, half)
    assert (width, height) == (1 + 4.2 * 2, 3.8 * 2)
    figure = Figure()
    draw(figure)
    names = [[line.get_label() for line in panel.lines] for panel in figure.axes]
    one = [["m0", "m2", "m4", "m6", "m8", "without reading"], ["m1", "m3", "m5", "m7", "without reading"]]
    assert names == one * 2
    assert [panel.get_title() for panel in figure.axes] == ["a", "a", "b", "b"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
