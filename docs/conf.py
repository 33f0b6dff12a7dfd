"""The documentation as a site: `make docs`, then open build/site/index.html."""

import re
from typing import Any

import jpeft

project = "jpeft"
version = release = jpeft.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results"]
myst_heading_anchors = 3
smartquotes = False  # W' is not an apostrophe
html_theme = "furo"
html_title = "jpeft"
html_show_copyright = False
html_copy_source = html_show_sourcelink = False
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in a list, and not again one by one
autodoc_default_options = {"exclude-members": "__new__, __init__, count, index"}

SPAN = re.compile(r"`([^`]+)`")


def plain(text: str) -> str:
    """Docstrings are Markdown: code is between single backquotes, and other signs mean nothing."""
    parts = SPAN.split(text)
    # A letter right behind a span needs a space that is not printed.
    spans = (
        f"``{part}``" + r"\ " * bool(re.match(r"\w", after))
        for part, after in zip(parts[1::2], parts[2::2], strict=True)
    )
    others = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return others[0] + "".join(span + other for span, other in zip(spans, others[1:], strict=True))


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Called by Sphinx, before it reads the sections of a docstring."""
    lines[:] = plain("\n".join(lines)).split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=100)
