import gc
import os
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.core.errors import UserError
from jpeft.run.stopping import Stopped
from jpeft.training import checkpoint
from jpeft.training.checkpoint import Progress
from jpeft.training.step import State

PROGRESS = Progress([{"epoch": 1, "step": 3, "train_loss": 0.1 + 0.2, "f1": 1 / 3}], 0.7, {"train": 1.25, "compile": 2})


# Orbax leaves coroutines behind where reading fails, which complain when they are collected.
leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step=3, width=4):
    w = jax.random.normal(jax.random.key(step), (width, 2))
    trainable = {"params": {"classifier": {"kernel": w}}, "peft": {"lora_0": {"encoder/layer_0": {"a": 2 * w}}}}
    return State(jnp.int32(step), trainable, optax.adam(1e-3).init(trainable))


def like(**changes):
    return jax.tree.map(jnp.zeros_like, state(**changes))


def test_round_trip_is_exact(tmp_path):
    checkpoint.save(tmp_path / "latest", state(), PROGRESS)
    restored = checkpoint.restore(tmp_path / "latest", like())
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, state())
    chex.assert_trees_all_equal_dtypes(restored.state, state())
    chex.assert_trees_all_equal_structs(restored.state, state())
    assert restored.progress == PROGRESS


def test_the_newest_is_kept_with_the_one_before(tmp_path):
    for step in (3, 9, 10):
        checkpoint.save(tmp_path, state(step), PROGRESS._replace(loss_sum=float(step)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["10", "9"]
    restored = checkpoint.restore(tmp_path, like())
    assert restored is not None
    assert (int(restored.state.step), restored.progress.loss_sum) == (10, 10.0)
    chex.assert_trees_all_equal(restored.state, state(10))


def test_lists_of_files_go_with_their_checkpoints(tmp_path):
    for step in (3, 9, 10):
        checkpoint.save(tmp_path, state(step), PROGRESS)
    assert sorted(path.name for path in tmp_path.glob(".*.json")) == [".10.json", ".9.json"]


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.restore(tmp_path / "none", like()) is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    assert checkpoint.restore(tmp_path / "empty", like()) is None


def test_saving_a_step_twice_leaves_the_first(tmp_path):
    checkpoint.save(tmp_path, state(), PROGRESS)
    checkpoint.save(tmp_path, state(), PROGRESS._replace(loss_sum=9.0))
    restored = checkpoint.restore(tmp_path, like())
    assert restored is not None
    assert restored.progress.loss_sum == PROGRESS.loss_sum


@leaves_coroutines
@pytest.mark.parametrize("other", ["shape", "missing", "surplus"])
def test_another_structure_is_refused(tmp_path, other):
    checkpoint.save(tmp_path, state(), PROGRESS)
    wanted = like(width=5) if other == "shape" else like()
    if other == "missing":
        wanted.trainable["params"]["pooler"] = jnp.zeros(3)
    if other == "surplus":
        del wanted.trainable["peft"]["lora_0"]
    with pytest.raises(UserError, match=r"no checkpoint in .* can be resumed .* delete the folder") as caught:
        checkpoint.restore(tmp_path, wanted)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()


@leaves_coroutines
def test_a_checkpoint_with_a_file_gone_is_refused(tmp_path):
    checkpoint.save(tmp_path, state(), PROGRESS)
    shutil.rmtree(tmp_path / "3" / "state")
    with pytest.raises(UserError, match="delete the folder"):
        checkpoint.restore(tmp_path, like())
    gc.collect()


def flip(folder, item):
    """Flips a bit in the middle of the largest file of an item."""
    path = max((p for p in (folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


@leaves_coroutines
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("item", ["state", "progress"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, item, listed):
    """Also without the list of its files, which a run that was killed may not have written."""
    for step in (3, 9):
        checkpoint.save(tmp_path, state(step, width=400), PROGRESS)
    flip(tmp_path / "9", item)
    if not listed:
        (tmp_path / ".9.json").unlink()
    told = []
    restored = checkpoint.restore(tmp_path, like(width=400), told.append)
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, state(3, width=400))
    assert len(told) == 1
    assert "9 cannot be resumed" in told[0]
    assert ("its files were changed" in told[0]) == listed
    checkpoint.save(tmp_path, state(9, width=400), PROGRESS)  # reached again: what was damaged is not in the way
    restored = checkpoint.restore(tmp_path, like(width=400))
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, state(9, width=400))
    gc.collect()


@leaves_coroutines
def test_damaged_checkpoints_alone_are_refused_and_kept(tmp_path):
    for step in (3, 9):
        checkpoint.save(tmp_path, state(step, width=400), PROGRESS)
        flip(tmp_path / str(step), "state")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.restore(tmp_path, like(width=400))
    assert {"3", "9"} <= {path.name for path in tmp_path.iterdir()}
    gc.collect()


def test_a_full_disk_is_one_line_and_leaves_what_is_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(3), PROGRESS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    with pytest.raises(UserError, match=r"0\.4 MB are free, 0\.5 MB are needed"):
        checkpoint.save(tmp_path, state(9), PROGRESS)
    restored = checkpoint.restore(tmp_path, like())
    assert restored is not None
    assert int(restored.state.step) == 3


def test_what_else_the_writers_meet_is_one_line(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def fails(*args, **kwargs):
        raise ValueError("UNAVAILABLE: somewhere\n" + "deep inside " * 100)

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    with pytest.raises(UserError, match=r"cannot write a checkpoint to .*UNAVAILABLE") as caught:
        checkpoint.save(tmp_path, state(), PROGRESS)
    assert "\n" not in str(caught.value)


def test_leftovers_of_a_crash_do_not_matter(tmp_path):
    checkpoint.save(tmp_path, state(), PROGRESS)
    for leftover in ("9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-1234", "12.orbax-checkpoint-tmp-5"):
        shutil.copytree(tmp_path / "3", tmp_path / leftover)
        (tmp_path / leftover / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / leftover / "progress")
    restored = checkpoint.restore(tmp_path, like())
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, state())
    checkpoint.save(tmp_path, state(9), PROGRESS)
    restored = checkpoint.restore(tmp_path, like())
    assert restored is not None
    chex.assert_trees_all_equal(restored.state, state(9))


def test_only_leftovers_are_no_checkpoint(tmp_path):
    (tmp_path / "9.orbax-checkpoint-tmp-1234" / "state").mkdir(parents=True)
    assert checkpoint.restore(tmp_path, like()) is None


@pytest.mark.parametrize("where", ["4/pipe", "4/_CHECKPOINT_METADATA", "4"])
def test_pipes_are_not_waited_for(tmp_path, where):
    checkpoint.save(tmp_path, state(), PROGRESS)
    checkpoint.save(tmp_path, state(4), PROGRESS)
    if (tmp_path / where).exists():
        checkpoint._remove(tmp_path / where)
    os.mkfifo(tmp_path / where)
    warned = []
    found = checkpoint.restore(tmp_path, like(), warned.append)
    assert found is not None
    assert int(found.state.step) == 3
    assert f"{where} is neither a file nor a folder" in warned[0]
    assert not (tmp_path / "4").exists()


def test_damage_in_the_checkpoint_before_does_not_stay(tmp_path):
    checkpoint.save(tmp_path, state(), PROGRESS)
    checkpoint.save(tmp_path, state(4), PROGRESS)
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[" * 100_000)  # which Orbax cannot read
    assert int(checkpoint.restore(tmp_path, like()).state.step) == 4
    checkpoint.save(tmp_path, state(5), PROGRESS)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["4", "5"]


def test_nothing_but_pipes_is_one_line(tmp_path):
    checkpoint.save(tmp_path, state(), PROGRESS)
    os.mkfifo(tmp_path / "3" / "pipe")
    with pytest.raises(UserError, match=r"pipe is neither a file nor a folder.*: delete the folder to start again"):
        checkpoint.restore(tmp_path, like())


def test_work_in_the_background_is_done_in_turn_while_other_work_goes_on():
    done, go = [], threading.Event()

    def first():
        assert go.wait(60)
        done.append("first")

    with checkpoint.in_background() as background:
        background(first)
        done.append("meanwhile")
        go.set()
        background(lambda: done.append("second"))
        assert done[:2] == ["meanwhile", "first"]  # a piece waits for the one before
    assert done == ["meanwhile", "first", "second"]


def failing():
    raise UserError("the disk is full")


def twice(background):
    background(failing)
    background(lambda: None)


def stop(background):
    background(failing)
    raise Stopped("stopped and saved")  # which is not true


@pytest.mark.parametrize("work", [lambda background: background(failing), twice, stop])
def test_work_in_the_background_that_fails_is_heard_of(work):
    with pytest.raises(UserError, match="the disk is full"), checkpoint.in_background() as background:
        work(background)


def test_a_snapshot_stays_when_the_state_is_given_up():
    given = State(jnp.int32(3), {"params": jnp.arange(4.0)}, ())
    kept = checkpoint.snapshot(given)
    jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)(given)
    np.testing.assert_array_equal(kept.trainable["params"], np.arange(4.0))
    assert kept.step == 3
