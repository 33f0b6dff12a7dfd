import time

from jpeft.run.clock import Clock


def test_laps_are_told_apart_from_compiling():
    clock, compiling = Clock({"train": 1.0}), [0.0]
    clock.start(lambda: compiling[0])
    time.sleep(0.03)
    compiling[0] = 0.02
    clock.lap("train")
    clock.lap("evaluate")
    assert 1.01 <= clock.seconds["train"] < 1.5
    assert clock.seconds["compile"] == 0.02
    assert 0 <= clock.seconds["evaluate"] < 0.5


def test_a_block_is_timed():
    clock = Clock()
    for _ in range(2):
        with clock.timing("load"):
            time.sleep(0.01)
    assert 0.02 <= clock.seconds["load"] < 0.5
