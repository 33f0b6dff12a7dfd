"""The page about finished runs, from the files that a run leaves."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report.test_tables import report

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.report import __main__, page, tables


def leave(workdir, classes=2, **changes):
    """Files of a finished run of two seeds."""
    about, rng = report(**changes), np.random.default_rng(len(str(workdir)))
    files.write_record(workdir / "report.json", tables.REPORT, about)
    inputs = {"labels": ["no <b>", "yes"][:classes], **{name: [40, digest] for name, digest in about["data"].items()}}
    files.write_record(workdir / "inputs.json", "list of a run's inputs", inputs)
    for row in about["metrics"]["per_seed"]:
        folder = workdir / f"seed_{row['seed']}"
        history = [{"epoch": i, "train_loss": 1 / i, **row["last"]} for i in (1, 2)]
        files.write_record(folder / "result.json", "result of one seed", {"history": history})
        labels = np.arange(40) % 2 if classes > 1 else np.linspace(0, 1, 40)
        arrays = {"logits": rng.normal(size=(40, classes)).astype(np.float32), "labels": labels.astype(np.float32)}
        if classes > 1:
            arrays["labels"] = labels.astype(np.int32)
        files.write_leaves(folder / "predictions.safetensors", arrays)
    return workdir


class Tags(HTMLParser):
    """Fails on tags that do not match, and notes what a browser would fetch."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.fetched += [v for name, v in attrs if name in ("src", "href") and not v.startswith(("data:", "#"))]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_is_one_file_that_fetches_nothing(tmp_path):
    runs = [leave(tmp_path / "one"), leave(tmp_path / "other", method="houlsby", warnings=["a <script> & more"])]
    (tmp_path / "one" / "choice.png").write_bytes(b"\x89PNG")
    text = page.page([page.finished(path, path.name) for path in runs])
    tags = Tags()
    tags.feed(text)
    assert not tags.fetched
    assert tags.open in ([], ["html"])
    # Of both: curves, calibration, agreement; of each: its confusions.
    assert tags.seen.count("svg") == 5
    assert "a &lt;script&gt; &amp; more" in text
    assert "no &lt;b&gt;" in text
    assert "data:image/png;base64,iVBORw==" in text
    assert re.search(r"<td>houlsby</td><td>mrpc</td>", text)


def test_values_have_no_classes_to_confuse(tmp_path):
    text = page.page([page.finished(leave(tmp_path / "one", classes=1), "one")])
    assert text.count("<svg") == 1  # the curves


def test_the_program_writes_what_is_asked_for(tmp_path, capsys):
    run = leave(tmp_path / "one")
    asked = [f"--{name}={tmp_path / name}" for name in ("html", "latex", "csv")]
    assert __main__.main([str(run), *asked]) == 0
    assert (tmp_path / "html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "latex").read_text().startswith("\\begin{tabular}")
    assert (tmp_path / "csv").read_text().startswith("method,task,model,accuracy")
    assert "| lora " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--htm=x"], "error: unrecognized arguments: --htm=x; see --help"),
        (["--html"], "error: argument --html: expected one argument"),
        (["--html", "--csv"], "error: argument --html: expected one argument"),
        ([], "error: the following arguments are required: workdirs"),
    ],
)
def test_flags_that_are_wrong(tmp_path, capsys, arguments, says):
    run = [str(leave(tmp_path / "one"))] if arguments else []
    assert __main__.main([*run, *arguments]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(says)
    assert not out.out


def test_a_report_of_another_run_is_refused(tmp_path, capsys):
    run, other = leave(tmp_path / "one"), leave(tmp_path / "other", data={"train": "b", "dev": "b"})
    (run / "report.json").write_bytes((other / "report.json").read_bytes())
    assert __main__.main([str(run)]) == 2
    assert "report.json is of another run than" in capsys.readouterr().err
    assert __main__.main([str(other)]) == 0


def test_a_page_of_nothing():
    with pytest.raises(UserError, match="at least one finished run"):
        page.page([])
