import csv
import io

from jpeft.report import formats

TABLE = (["method", "accuracy"], [["lora", "81.20 ± 0.50"], ["a_b & 5 %", "-"], ['"x", y', "1,000"]])


def test_markdown_has_columns_of_even_width():
    lines = formats.markdown(TABLE).splitlines()
    assert lines[0] == "| method    | accuracy     |"
    assert {len(line) for line in lines} == {len(lines[0])}


def test_csv_reads_back():
    assert list(csv.reader(io.StringIO(formats.separated(TABLE)))) == [TABLE[0], *TABLE[1]]


def test_latex_escapes_and_aligns_numbers():
    text = formats.latex(TABLE)
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\nmethod & accuracy \\\\\n\\midrule\n")
    assert "lora & 81.20 $\\pm$ 0.50 \\\\" in text
    assert "a\\_b \\& 5 \\% & - \\\\" in text
