"""Runs whose console is heard."""

from jpeft.run import experiment
from jpeft.run.console import Console


class Heard(Console):
    """Keeps what a run says."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines, self.warnings = [], []

    def say(self, text=""):
        self.lines.append(text)

    def warn(self, text):
        self.warnings.append(text)


def run(config, workdir):
    return experiment.run(config, workdir, Heard())


def again(config, workdir):
    console = Heard()
    return experiment.run(config, workdir, console), console
