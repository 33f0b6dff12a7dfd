import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from conftest import randomised
from jax.extend.random import threefry_2x32

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.transforms.said import fastfood, hadamard, said


def dense_map(seed, name, size, dim):
    """Fastfood's matrix [size, dim] from dense factors, with the random numbers read from the definition."""
    n = 2
    while n < max(size, dim):
        n *= 2
    key = jnp.array([seed, zlib.crc32(name.encode())], jnp.uint32)
    bits = np.asarray(threefry_2x32(key, jnp.arange(2 * n + 16, dtype=jnp.uint32)), np.uint64)
    signs = np.where(bits[:n] >= 2**31, 1.0, -1.0)
    g = scipy.stats.norm.ppf((bits[n : 2 * n] // 512 + 0.5) / 2**23)
    order = np.arange(n, dtype=np.uint64)
    half = max((n.bit_length() - 1) // 2, 1)
    for multiplier, offset in bits[2 * n :].reshape(8, 2):
        order = (order * (multiplier | np.uint64(1)) + offset) % np.uint64(n)
        order = order ^ (order >> np.uint64(half))
    p = np.zeros((n, n))
    p[np.arange(n), order.astype(int)] = 1.0
    assert (p.sum(0) == 1).all()
    h = scipy.linalg.hadamard(n).astype(float)
    full = h @ np.diag(g) @ p @ h @ np.diag(signs)
    # As in the reference: 1 / sqrt(n sum(g^2)), and again 1 / sqrt(size / n).
    return full[:size, :dim] / np.sqrt(n * (g**2).sum()) / np.sqrt(size / n)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_fast_transform_is_the_hadamard_matrix(n):
    x = jax.random.normal(jax.random.key(n), (n,))
    np.testing.assert_allclose(hadamard(x), scipy.linalg.hadamard(n) @ np.asarray(x, np.float64), atol=1e-4)


@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 4), ((4, 4), 16), ((5,), 11), ((), 1), ((1,), 2), ((16, 24), 100)])
def test_fastfood_is_its_dense_factors(key, shape, dim):
    d = jax.random.normal(key, (dim,))
    seed = jnp.uint32(4_000_000_123)
    wanted = dense_map(4_000_000_123, "kernel", int(np.prod(shape)), dim) @ np.asarray(d, np.float64)
    now = fastfood(d, seed, "kernel", shape)
    assert now.shape == shape
    np.testing.assert_allclose(now, wanted.reshape(shape), rtol=1e-3, atol=1e-5)
    grad = jax.grad(lambda d: (fastfood(d, seed, "kernel", shape) * now).sum())(d)
    np.testing.assert_allclose(
        grad, dense_map(4_000_000_123, "kernel", int(np.prod(shape)), dim).T @ wanted, rtol=1e-3, atol=1e-4
    )


def test_the_map_about_keeps_the_norm_and_differs_by_seed_and_name():
    d = jax.random.normal(jax.random.key(2), (50,))
    images = [fastfood(d, jnp.uint32(s), name, (40, 50)).ravel() for s, name in ((1, "a"), (2, "a"), (1, "b"))]
    for x in images:
        assert float(jnp.linalg.norm(x) / jnp.linalg.norm(d)) == pytest.approx(1.0, abs=0.25)
    for x, y in itertools.combinations(images, 2):
        assert abs(float(x @ y) / float(d @ d)) < 0.2


def trained(method, toy, key):
    """Leaves as after training: random but for the seeds."""
    leaves = jpeft.init(method, key, toy.sites)
    learns, fixed = split(leaves)
    return tree.union(randomised(learns, scale=1.0), fixed)


@pytest.mark.parametrize("layer_wise", [True, False])
def test_equals_the_dense_map_and_the_merged_one(toy, key, layer_wise):
    method = said(20, layer_wise, "query|value|pooler")
    leaves = trained(method, toy, key)
    own = leaves["said_0"]
    d = np.asarray(own["shared"]["d"], np.float64)
    flat = tree.flatten(toy.params)
    sites = {f"encoder/layer_{i}/attention/{end}": f"encoder/layer_{i}" for i in (0, 1) for end in ("query", "value")}
    sites["pooler"] = "outside"
    assert set(own) == {"shared", *sites}
    for path, group in sites.items():
        factor = float(own["shared"]["lambda"][group]) if layer_wise else 1.0
        for name in ("kernel", "bias"):
            at = (*path.split("/"), name)
            moved = dense_map(int(own[path]["fixed"]["seed"]), name, flat[at].size, 20) @ d
            flat[at] = flat[at] + jnp.asarray(factor * moved.reshape(flat[at].shape), jnp.float32)
    now = toy.logits(method, leaves)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.05
    np.testing.assert_allclose(now, toy.logits(jpeft.chain(), {}, tree.unflatten(flat)), atol=2e-5)
    merged = jpeft.merge(method, leaves, toy.params)
    assert merged.transform.members == ()
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_allclose(x, flat[path], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, merged.params), now, atol=1e-5)


def test_a_whole_layer_is_a_target_and_what_is_below_it_counts_once(toy, key):
    method = said(10, targets=r"layer_\d+|query", layers=[1])
    leaves = trained(method, toy, key)
    assert set(leaves["said_0"]) == {"shared", "encoder/layer_1"}
    assert set(leaves["said_0"]["shared"]["lambda"]) == {"encoder/layer_1"}
    merged = tree.flatten(jpeft.merge(method, leaves, toy.params).params)
    for path, x in tree.flatten(toy.params).items():
        same = bool((merged[path] == x).all())
        assert same == (path[:2] != ("encoder", "layer_1")), path


@pytest.mark.usefixtures("optimised")
def test_a_fresh_one_leaves_the_logits_bit_identical(toy, key):
    method = said(10)
    leaves = jpeft.init(method, key, toy.sites)
    np.testing.assert_array_equal(toy.logits(method, leaves), toy.logits(jpeft.chain(), {}))
    shared = leaves["said_0"]["shared"]
    assert shared["d"].shape == (10,)
    assert not shared["d"].any()
    assert shared["lambda"] == {"encoder/layer_0": 1.0, "encoder/layer_1": 1.0}
    seeds = [own["fixed"]["seed"] for path, own in leaves["said_0"].items() if path != "shared"]
    assert {(x.dtype, x.shape) for x in seeds} == {(jnp.dtype("uint32"), ())}
    assert len({int(x) for x in seeds}) == 4


def test_gradients_are_those_of_the_weights_through_the_dense_map(toy, key):
    method = said(10, targets="query|pooler")
    learns, fixed = split(trained(method, toy, key))
    now = jax.jit(jax.grad(lambda x: (toy.logits(method, tree.union(x, fixed)) ** 2).sum()))(learns)["said_0"]["shared"]
    merged = jpeft.merge(method, tree.union(learns, fixed), toy.params).params
    weights = jax.jit(jax.grad(lambda params: (toy.logits(jpeft.chain(), {}, params) ** 2).sum()))(merged)
    shared = learns["said_0"]["shared"]
    d = np.asarray(shared["d"], np.float64)
    wanted_d, wanted = np.zeros(10), {"encoder/layer_0": 0.0, "encoder/layer_1": 0.0, "outside": 0.0}
    for path, own in fixed["said_0"].items():
        group = "outside" if path == "pooler" else "/".join(path.split("/")[:2])
        for name in ("kernel", "bias"):
            g = np.asarray(tree.flatten(weights)[(*path.split("/"), name)], np.float64).ravel()
            back = dense_map(int(own["fixed"]["seed"]), name, g.size, 10).T @ g
            wanted_d += float(shared["lambda"][group]) * back
            wanted[group] += back @ d
    np.testing.assert_allclose(now["d"], wanted_d, rtol=1e-3, atol=1e-3 * np.abs(wanted_d).max())
    for group, value in wanted.items():
        assert float(now["lambda"][group]) == pytest.approx(value, rel=1e-3, abs=1e-4)


def test_bad_options(toy, key):
    with pytest.raises(UserError, match="intrinsic_dim must be positive, got 0"):
        said(0)
    with pytest.raises(UserError, match="intrinsic_dim must be an integer"):
        said(1.5)
    with pytest.raises(UserError, match="core' is a Core without parameters"):
        jpeft.init(said(targets="core"), key, toy.sites)
    with pytest.raises(UserError, match="did you mean 'query'"):
        jpeft.init(said(targets="qeury"), key, toy.sites)
