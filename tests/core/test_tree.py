import jax
import jax.numpy as jnp
import pytest

from jpeft import UserError
from jpeft.core import tree

TREE = {"a": {"x/y": jnp.ones((2, 3)), "b": jnp.ones(4)}, "c": jnp.zeros(())}


def test_flatten_keeps_keys_that_are_paths():
    assert set(tree.flatten(TREE)) == {("a", "x/y"), ("a", "b"), ("c",)}
    assert jax.tree.structure(tree.unflatten(tree.flatten(TREE))) == jax.tree.structure(TREE)


def test_union_is_the_inverse_of_split():
    inside, outside = tree.split(TREE, lambda path: path[-1] == "b")
    assert set(tree.flatten(inside)) == {("a", "b")}
    assert set(tree.flatten(outside)) == {("a", "x/y"), ("c",)}
    assert jax.tree.structure(tree.union(outside, inside)) == jax.tree.structure(TREE)
    assert tree.union({"c": 1}, {"c": 2}) == {"c": 2}


def test_replace_copies_the_way_and_shares_the_rest():
    new = tree.replace(TREE, "a/b", lambda x: x + 1)
    assert new["a"]["b"][0] == 2
    assert TREE["a"]["b"][0] == 1
    assert new["a"]["x/y"] is TREE["a"]["x/y"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a/bb/c", "have no 'a/bb/c': did you mean 'b'"),
        ("c/d", "have no 'c/d': expected those of the whole model"),
        ("d", "have no 'd': expected one of 'a', 'c'"),
    ],
)
def test_a_path_that_is_not_there(path, says):
    for call in (lambda: tree.at(TREE, path), lambda: tree.replace(TREE, path, lambda x: x)):
        with pytest.raises(UserError, match=f"the parameters {says}"):
            call()


def test_sizes():
    assert tree.count(TREE) == 11
    assert tree.num_bytes({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}) == 14


def test_empty_dicts_are_kept():
    leaves = {"x_0": {"shared": {"v": jnp.ones(2)}, "site": {}}, "y_0": {}}
    inside, outside = tree.split(leaves, lambda path: path[-1] == "v")
    assert tree.union(outside, inside) == leaves
    assert tree.split({}, lambda path: True) == ({}, {})
