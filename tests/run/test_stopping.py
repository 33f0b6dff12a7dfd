"""SIGTERM, heard also where Python drops what its handler raises."""

import contextlib
import os
import signal
import time

import pytest

from jpeft.run import stopping
from jpeft.run.stopping import Stopped, deferred, raised


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_comes_again_if_it_was_not_heard(monkeypatch):
    monkeypatch.setattr(stopping, "AGAIN", 0.05)

    def work():
        with contextlib.suppress(Stopped):  # as in a callback of the garbage collector
            ask()
        time.sleep(5)

    with pytest.raises(Stopped), raised():
        work()


def test_it_does_not_come_again_on_its_way_out(monkeypatch):
    monkeypatch.setattr(stopping, "AGAIN", 0.02)
    done = []

    def work():
        try:
            ask()
        finally:
            time.sleep(0.2)
            done.append(True)

    with pytest.raises(Stopped), raised():
        work()
    assert done
    time.sleep(0.1)  # nothing is left that would end this process


def test_within_it_may_be_noted_only():
    with raised():
        with deferred() as came:
            ask()
            assert came()
        with pytest.raises(Stopped):
            ask()
