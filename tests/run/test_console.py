import pytest

from jpeft.run.console import Console
from jpeft.training.loop import Event


def step(loss, epoch=1, at=1):
    return Event(None, None, epoch, at, (loss,), (1.0,), loss, ())


ROW = {"epoch": 1, "step": 1200, "train_loss": 0.5, "accuracy": 0.75, "f1": 0.8}


def test_lines_are_printed_as_they_are(capsys):
    console = Console()
    console.say("[bold]x[/bold] " + "long " * 60 + "end")
    console.title("[red]title")
    console.warn("[0] is odd")
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["[bold]x[/bold] " + "long " * 60 + "end", "[red]title", "warning: [0] is odd"]


def test_quiet_prints_nothing(capsys):
    console = Console(quiet=True)
    console.say("a")
    console.title("b")
    console.warn("c")
    with console.waiting("d"), console.training(2, 0) as bar:
        bar.show([step(1.0)], "accuracy", 4)
        bar.show([step(1.0)._replace(row=ROW)], "accuracy", 4)
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_one_line_an_epoch_and_no_bar(capsys):
    console = Console()
    with console.training(4, 2) as bar:
        for _ in range(2):
            bar.show([step(1.0)], "accuracy", 4)
        bar.show([step(1.0)._replace(row=ROW)], "accuracy", 4)
    out = capsys.readouterr().out
    assert out.strip() == "epoch  1  step  1,200  loss 0.5000  accuracy 0.7500  f1 0.8000"
    assert "\x1b" not in out


def test_seeds_that_train_together_have_their_own_lines(capsys):
    with Console().training(4, 0, ["seed 1", "seed 2"]) as bar:
        bar.show([step(1.0), step(2.0)], "accuracy", 4)
        bar.show([step(1.0)._replace(row=ROW), step(2.0)._replace(row={**ROW, "accuracy": 0.5})], "accuracy", 4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["seed 1", "seed 2"]
    assert ["accuracy 0.7500" in lines[0], "accuracy 0.5000" in lines[1]] == [True, True]


def test_the_bar_shows_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Console().training(4, 2) as bar:
        bar.show([step(0.0, 2)], "accuracy", 4)
        bar.show([step(0.25, 2, at=2)], "accuracy", 4)  # the sum of the two
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "loss 0.125" in out


def test_an_error_ends_the_bar_and_goes_on(capsys):
    with pytest.raises(KeyError), Console().training(4, 0):
        raise KeyError("x")
    Console().say("after")
    assert capsys.readouterr().out.splitlines()[-1] == "after"


@pytest.mark.filterwarnings("error")  # Rich would warn that there are no widgets, once for each bar
def test_a_notebook_without_widgets_gets_lines_alone(capsys, monkeypatch):
    console = Console()
    monkeypatch.setattr(console._rich, "is_jupyter", True)
    monkeypatch.setattr(console._rich, "_force_terminal", True)
    monkeypatch.setattr("jpeft.run.console.find_spec", lambda name: None)
    with console.waiting("d"), console.counting("rows", 2) as count, console.training(2, 0) as bar:
        count(1)
        bar.show([step(1.0)], "accuracy", 4)
        bar.show([step(1.0)._replace(row=ROW)], "accuracy", 4)
    assert capsys.readouterr().out.count("JupyterRenderable") == 2  # "rows", and the epoch
