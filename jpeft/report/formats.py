"""A table as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence

__all__ = ["Table", "latex", "markdown", "separated"]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # names of the columns, rows

_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: "\\" + sign for sign in "&%$#_{}"}


def markdown(table: Table) -> str:
    """With columns of even width, for terminals."""
    head, rows = table
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def separated(table: Table) -> str:
    """Comma-separated, as spreadsheets read it."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table[0], *table[1]])
    return out.getvalue()


def latex(table: Table) -> str:
    """A `tabular` for LaTeX's package booktabs; numbers to the right."""
    head, rows = table
    sides = "".join("r" if any(_is_number(row[i]) for row in rows) else "l" for i in range(len(head)))
    escaped = (["".join(_LATEX.get(sign, sign) for sign in cell) for cell in row] for row in [head, *rows])
    body = [" & ".join(row) + r" \\" for row in escaped]
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", ""])


def _is_number(cell: str) -> bool:
    return cell.split(" ")[0].replace(",", "").replace(".", "", 1).lstrip("+-").isdigit()
