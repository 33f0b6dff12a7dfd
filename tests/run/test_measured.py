"""Fisher information that is kept, and gone on with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import UserError
from jpeft.core import files
from jpeft.run import measured as measure
from jpeft.run.console import Console

TREE = {"a": jnp.ones((3, 2)), "b": {"c": jnp.ones(2)}}
GROUPS = [jax.random.normal(jax.random.key(0), (5, 3)), jax.random.normal(jax.random.key(1), (4, 3))]
ABOUT = {"model": "m", "rows": [1, 2], "labels": "empirical"}


def loss(tree, x):
    return jnp.tanh(x @ tree["a"] + tree["b"]["c"]).sum()


def run(path, about=ABOUT, fn=loss, **options):
    return measure.measure(path, about, Console(quiet=True), fn, TREE, GROUPS, microbatch=2, **options)


def test_the_result_is_kept_with_what_it_was_measured_from(tmp_path):
    path = tmp_path / "seed_1" / "fisher.safetensors"
    found = run(path)
    wanted = jpeft.fisher(loss, TREE, GROUPS, grouped=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    arrays, about = measure.read(path)
    assert set(arrays) == {"a", "b:c"}
    assert about == {**ABOUT, "done": 9}
    again = run(path, fn=lambda tree, x: pytest.fail("measured again"))
    jax.tree.map(np.testing.assert_array_equal, again, found)
    other = run(path, {**ABOUT, "model": "n"}, fn=lambda tree, x: 2 * loss(tree, x))
    np.testing.assert_allclose(other["a"], 4 * wanted["a"], rtol=1e-6)
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_stop_half_way_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SAVE_SECONDS", -1.0)
    path, seen, real = tmp_path / "fisher.safetensors", [], measure.accumulate

    def stops(*args, **options):
        for running in real(*args, **options):
            if running.done > 4:
                raise KeyboardInterrupt
            yield running

    monkeypatch.setattr(measure, "accumulate", stops)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert not path.exists()

    def goes_on(*args, start, **options):
        seen.append(start.done)
        return real(*args, start=start, **options)

    monkeypatch.setattr(measure, "accumulate", goes_on)
    found = run(path)
    assert seen == [4]
    jax.tree.map(np.testing.assert_array_equal, found, jpeft.fisher(loss, TREE, GROUPS, grouped=True, microbatch=2))
    assert [p.name for p in tmp_path.iterdir()] == ["fisher.safetensors"]


def test_files_of_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="there is no file"):
        measure.read(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file"):
        measure.read(path)
    files.write_leaves(path, {"a": np.ones(2)})
    with pytest.raises(UserError, match="does not say what"):
        measure.read(path)
    files.write_leaves(path, {"a": np.ones(2)}, {"about": "{not json"})
    with pytest.raises(UserError, match="does not hold Fisher information"):
        measure.read(path)
    files.write_leaves(path, {"a": np.ones(2)}, {"about": "{}"})
    with pytest.raises(UserError, match="does not say what"):
        measure.read(path)


def test_a_sum_that_is_not_finite_is_nothing_to_go_on_from(tmp_path, monkeypatch):
    """Saved after every microbatch: the second one meets NaN, and once that is mended the run comes to its end."""
    monkeypatch.setattr(measure, "SAVE_SECONDS", -1.0)
    path, row = tmp_path / "fisher.safetensors", GROUPS[0][3]
    bad = lambda tree, x: loss(tree, jnp.where((x == row).all(), jnp.nan, x))
    for _ in range(2):
        with pytest.raises(UserError, match="not finite at example 3"):
            run(path, fn=bad)
    found = run(path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, jpeft.fisher(loss, TREE, GROUPS, grouped=True)
    )
