"""Freeze and reconfigure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised, setting

import jpeft
from jpeft.core import tree
from jpeft.core.partition import split
from jpeft.core.transform import FIXED
from jpeft.transforms.far import distances, far

METHOD = far(0.25, num_examples=4, batch_size=2, learning_rate=1e-2)
PATHS = [f"encoder/layer_{i}/ffn" for i in range(2)]


def fresh(toy, key):
    return jpeft.init(METHOD, key, toy.sites, toy.params)


@pytest.mark.usefixtures("optimised")
def test_a_fresh_one_leaves_the_logits_bit_identical(toy, key):
    np.testing.assert_array_equal(toy.logits(METHOD, fresh(toy, key)), toy.logits(jpeft.chain(), {}))


def test_it_is_a_frozen_and_a_trained_network_side_by_side(toy, key):
    """Against the model whose feed-forward weights were cut in two, permuted, and put together by hand."""
    values, fixed = split(jpeft.prepare(METHOD, setting(toy, METHOD, key)))
    leaves = tree.union(randomised(values), fixed)
    params = {path: np.array(x) for path, x in tree.flatten(toy.params).items()}
    for path in PATHS:
        first, second = (leaves["far_0"][f"{path}/{name}"] for name in ("intermediate", "output"))
        nodes = np.asarray(first[FIXED]["nodes"])
        rest = np.setdiff1d(np.arange(24), nodes)
        at = tuple(path.split("/"))
        w1, b1 = params[(*at, "intermediate", "kernel")], params[(*at, "intermediate", "bias")]
        w2 = params[(*at, "output", "kernel")]
        params[(*at, "intermediate", "kernel")] = np.concatenate([w1[:, rest], w1[:, nodes] + first["kernel"]], 1)
        params[(*at, "intermediate", "bias")] = np.concatenate([b1[rest], b1[nodes] + first["bias"]])
        params[(*at, "output", "kernel")] = np.concatenate([w2[rest], w2[nodes] + second["kernel"]], 0)
    by_hand = toy.model.apply({"params": tree.unflatten(params)}, toy.ids, toy.mask)[0]
    np.testing.assert_allclose(toy.logits(METHOD, leaves), by_hand, atol=2e-5)
    merged = jpeft.merge(METHOD, leaves, toy.params)
    np.testing.assert_allclose(toy.logits(jpeft.chain(), {}, params=merged.params), by_hand, atol=2e-5)


def test_priming_finds_the_nodes_that_move_most(toy, key):
    """Against a plain training of the feed-forward networks with Adam, written out."""
    prepared = jpeft.prepare(METHOD, setting(toy, METHOD, key))["far_0"]

    def loss(nets, rows):
        flat = tree.flatten(toy.params)
        for path, net in nets.items():
            flat.update({(*path.split("/"), *name): x for name, x in tree.flatten(net).items()})
        logits = toy.model.apply({"params": tree.unflatten(flat)}, toy.ids[rows], toy.mask[rows])[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), toy.labels[rows, None], 1).mean()

    layers = {path: toy.params["encoder"][path.split("/")[1]]["ffn"] for path in PATHS}
    nets, m, v = layers, *(jax.tree.map(jnp.zeros_like, layers) for _ in range(2))
    for step, rows in enumerate([np.array([0, 1]), np.array([2, 3])], 1):
        g = jax.grad(loss)(nets, rows)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        nets = jax.tree.map(
            lambda w, m, v, t=step: w - 1e-2 * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), nets, m, v
        )
    for path in PATHS:
        moved = distances(layers[path], nets[path])
        nodes = np.asarray(prepared[f"{path}/intermediate"][FIXED]["nodes"])
        assert nodes.size == 6
        np.testing.assert_array_equal(nodes, prepared[f"{path}/output"][FIXED]["nodes"])
        others = np.setdiff1d(np.arange(24), nodes)
        assert moved[nodes].min() >= moved[others].max() * (1 - 1e-3)


def test_distances_count_column_bias_and_row():
    zero = {"intermediate": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "output": {"kernel": np.zeros((3, 2))}}
    one = {
        "intermediate": {"kernel": np.array([[1.0, 0, 0], [-1, 0, 0]]), "bias": np.array([0, 0.5, 0])},
        "output": {"kernel": np.array([[0, 0], [0, 0], [2.0, -3]])},
    }
    np.testing.assert_allclose(distances(zero, one), [2.0, 0.5, 5.0])


def test_what_cannot_be_is_refused(toy, key):
    with pytest.raises(jpeft.UserError, match="ratio must be above 0"):
        far(0)
    with pytest.raises(jpeft.UserError, match="layer 7 has no site"):
        jpeft.init(far(layers=[7]), key, toy.sites, toy.params)
