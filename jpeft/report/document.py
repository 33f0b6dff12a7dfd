"""The frame of an HTML page in one file: tables that sort, pictures with their captions, nothing from the network."""

import html

from jpeft.report.formats import Table

__all__ = ["document", "figure", "heading", "paragraph", "table", "warning"]

STYLE = """
:root { color-scheme: light; --line: #ccc; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
figure { margin: .8rem 0; } figure svg, figure img { max-width: 100%; height: auto; } figcaption { color: #555; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
.warning { border-left: 4px solid #D55E00; padding-left: .7rem; }
@media print { body { max-width: none; font-size: 10pt; } figure, table { break-inside: avoid; } }
"""
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], i = head.cellIndex;
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => row.cells[i].textContent.trim(), number = text => parseFloat(text.replaceAll(",", ""));
  const order = (a, b) => isNaN(number(a)) || isNaN(number(b))
    ? (isNaN(number(a)) - isNaN(number(b))) || a.localeCompare(b) : number(b) - number(a);
  const rows = [...body.rows].sort((a, b) => order(value(a), value(b)));
  body.append(...(down ? rows : rows.reverse()));
};
"""


def document(title: str, body: str) -> str:
    """A page with this heading, and what is below it as HTML."""
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}\n<script>{SORT}</script>\n</html>\n"
    )


def table(table: Table) -> str:
    """A table that a click on a column sorts."""
    head, rows = table
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    lines = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def figure(picture: str, text: str) -> str:
    """A picture, an SVG or IMG element, with a caption of plain text."""
    return f"<figure>{picture}<figcaption>{html.escape(text)}</figcaption></figure>"


def warning(text: str) -> str:
    """A paragraph that stands out."""
    return f'<p class="warning">{html.escape(text)}</p>'
