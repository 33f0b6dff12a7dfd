"""The site of the documentation: that nothing public is left out. CI builds it, with warnings as errors."""

import re
from pathlib import Path

import jpeft

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
TOLD = {"METHODS", "Plan", "__version__", "fishpal"}  # in a sentence


def test_the_reference_has_all_that_is_public():
    text = "".join(path.read_text() for path in sorted(REFERENCE.glob("*.md")))
    found = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", text, re.MULTILINE)
    assert len(found) == len(set(found))
    assert set(found) == {*jpeft.__all__} - TOLD
    assert all(name in text for name in TOLD - {"__version__"})
