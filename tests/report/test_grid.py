"""The page of a comparison, as Markdown and as HTML."""

import re

import numpy as np
import pytest
from report.test_comparison import LABELS, outcome
from report.test_page import Tags

from jpeft.report import comparison, drawings, grid
from jpeft.report.grid import Grid
from jpeft.report.published import Published

PUBLISHED = Published("lora", "roberta-base", "validation", "sst2", "accuracy", "95.1", "0.3", "a table")


def runs():
    return [
        outcome(variant, seed, accuracy, task, trainable)
        for task in ("sst2", "cola")
        for variant, accuracy, trainable in (("lora", 0.9, 0.3), ("head", 0.6, 0.0))
        for seed in (1, 2)
        if (variant, task) != ("head", "cola")
    ]


def of(outcomes, total, **more):
    return Grid(comparison.summarise(outcomes, draws=50), len(outcomes), total, comparison.baselines(outcomes), **more)


def rows(page, *names):
    """The cells of the rows of these variants in the first table that has them."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    found = {name: next(line for line in lines if line[2:].startswith(f"{name} ")) for name in names}
    return [[cell.strip() for cell in found[name].strip("|").split("|")] for name in names]


def test_the_page_has_a_row_a_variant_and_a_column_a_task():
    page = grid.markdown(of(runs(), 8), "report.png")
    assert "**6 of 8 cells are finished.**" in page
    lora, head = rows(page, "lora", "head")
    assert lora[:3] == ["lora", "0.300", "0.500"]
    assert all(cell.startswith("**") for cell in lora[3:])
    assert head[:3] == ["head", "0.000", "0.500"]
    assert head[4] == "-"
    assert "![Scores by task and variant](report.png)" in page


def test_a_size_that_differs_from_task_to_task_is_a_range():
    outcomes = [outcome("fishpal", 1, 0.9, task, trainable) for task, trainable in (("sst2", 5.0), ("cola", 0.1))]
    (found,) = rows(grid.markdown(of(outcomes, 2), None), "fishpal")
    assert found[1:3] == ["0.100 to 5.000", "0.500"]


def test_the_majority_stands_below_and_what_is_no_better_is_named():
    outcomes = [outcome("good", 1, 0.9), outcome("poor", 1, 0.3)]
    page = grid.markdown(of(outcomes, 2), None)
    (last,) = rows(page, "an answer that reads no text")
    share = float(np.mean(LABELS))
    assert last[1:] == ["0", "0", f"{100 * max(share, 1 - share):.1f}"]
    assert "**No better than an answer that reads no text: poor on sst2.**" in page
    assert "finished" not in page


def test_what_others_published_has_a_column_of_its_own():
    page = grid.markdown(of(runs(), 6, published={"sst2": {"lora": PUBLISHED}}, metrics={"cola": "matthews"}), None)
    head, lora, frozen = rows(page, "variant", "lora", "head")
    assert head[3:] == ["sst2", "published accuracy", "cola matthews"]
    assert (lora[4], frozen[4]) == ("95.1", "-")
    assert "a table (roberta-base, validation split)" in page


def test_the_html_is_one_file_with_the_same_cells():
    outcomes = runs()
    shown = of(outcomes, 6, published={"sst2": {"lora": PUBLISHED}}, unlike=["epochs are <3>"])
    text = grid.html(shown, outcomes, more="<p>more</p>")
    tags = Tags()
    tags.feed(text)
    assert not tags.fetched
    assert tags.seen.count("svg") == 2  # the scores, and which rows of SST-2 both have wrong; CoLA has one variant
    assert "epochs are &lt;3&gt;" in text
    assert "<p>more</p>" in text
    cells = {cell for row in grid.scores(shown)[1] for cell in row}
    assert not any("*" in cell for cell in cells)
    assert all(cell in text for cell in cells)
    assert "**" not in text
    assert text.count("†") == 3  # LoRA is the best on both; what it means


def test_values_have_no_rows_that_are_wrong():
    values = np.linspace(0, 5, 50)
    outcomes = [
        outcome(x, 1, 0.9, "stsb")._replace(predictions=values + y, labels=values) for x, y in (("a", 0), ("b", 1))
    ]
    assert grid._agreement(outcomes) == []


@pytest.mark.parametrize("many", [1, 2])
def test_the_picture_is_written(tmp_path, many):
    outcomes = [o for o in runs() if many == 2 or o.task.name == "sst2"]
    drawings.png(tmp_path / "report.png", *grid.drawing(comparison.summarise(outcomes, draws=9), outcomes))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_has_differences_of_its_own():
    """The interval is the one that the other order has, with the sign turned."""
    outcomes = [outcome(name, s, a) for name, a in (("best", 0.9), ("plain", 0.8), ("poor", 0.6)) for s in (1, 2)]
    table = comparison.summarise(outcomes, draws=50, reference="plain")
    page = grid.markdown(Grid(table, 6, 6, comparison.baselines(outcomes), reference="plain"), None)
    (shown,) = re.findall(r"## sst2: against plain\n\n(.*?)\n\n", page, re.DOTALL)
    assert re.findall(r"^\| (\w+) +\| ([+-])", shown, re.MULTILINE) == [("best", "+"), ("poor", "-")]
    gap, (low, high) = table["sst2"]["best"].against
    assert (gap, low, high) == pytest.approx(
        (-table["sst2"]["plain"].behind, *(-x for x in table["sst2"]["plain"].interval[::-1]))
    )
    for reference in ("", "best", "none"):
        table = comparison.summarise(outcomes, draws=50, reference=reference)
        shown = Grid(table, 6, 6, comparison.baselines(outcomes), reference=reference)
        assert "against" not in grid.markdown(shown, None)
        assert "against" not in grid.html(shown, outcomes)
