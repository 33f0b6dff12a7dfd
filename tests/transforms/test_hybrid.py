"""UniPELT and MAM. That they equal AdapterHub's is in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.transforms.mam import mam
from jpeft.transforms.unipelt import unipelt

SMALL = {"num_virtual_tokens": 2, "mlp_hidden": 4, "rank": 2}


def test_the_parts_of_each():
    assert list(jpeft.instances(unipelt())) == ["prefix_0", "pfeiffer_0", "lora_0"]
    assert list(jpeft.instances(unipelt("ap"))) == ["prefix_0", "pfeiffer_0"]
    assert list(jpeft.instances(mam())) == ["prefix_0", "parallel_0"]


def test_a_gate_that_is_shut_shuts_its_module(toy, key):
    """With every bias far below zero nothing of the modules is left but a prefix of zero keys and values."""
    method = unipelt(**SMALL)
    leaves = randomised(jpeft.init(method, key, toy.sites))

    def shut(path, x):
        names = [str(getattr(part, "key", part)) for part in path]
        return jnp.full_like(x, -1e4) if names[-2:] == ["gate", "bias"] else 0 * x if "gate" in names else x

    leaves = jax.tree_util.tree_map_with_path(shut, leaves)
    zeros = {
        path: {"key": jnp.zeros((2, 16)), "value": jnp.zeros((2, 16))} for path in leaves["prefix_0"] if "core" in path
    }
    expected = toy.logits(jpeft.prefix(2, None), {"prefix_0": zeros})
    np.testing.assert_allclose(toy.logits(method, leaves), expected, atol=1e-6)


@pytest.mark.slow
def test_each_example_opens_its_own_gates(toy, key):
    """A row's logits do not depend on the others, and padding does not open a gate."""
    method = unipelt(**SMALL)
    leaves = randomised(jpeft.init(method, key, toy.sites), scale=0.6)
    together = toy.logits(method, leaves)
    for i, n in enumerate(toy.mask.sum(1)):
        alone = toy.logits(method, leaves, ids=toy.ids[i : i + 1, :n], mask=toy.mask[i : i + 1, :n])
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


def test_a_plan_gives_a_hybrid_to_some_layers(toy, key):
    plan = {0: [jpeft.Entry("unipelt", SMALL)], 1: [jpeft.Entry("mam", {"num_virtual_tokens": 2, "bottleneck": 3})]}
    method = jpeft.build(plan)
    leaves = jpeft.init(method, key, toy.sites)
    layers = {name: {path.split("/")[1] for path in own if path != "shared"} for name, own in leaves.items()}
    assert layers == {
        "prefix_0": {"layer_1"}, "parallel_0": {"layer_1"},
        "prefix_1": {"layer_0"}, "pfeiffer_0": {"layer_0"}, "lora_0": {"layer_0"},
    }  # fmt: skip
    assert jnp.isfinite(toy.logits(method, leaves)).all()


def test_a_hybrid_can_be_a_candidate_of_fishpal(toy, key):
    candidates = {"unipelt": jpeft.Entry("unipelt", SMALL), "lora": jpeft.Entry("lora", {"rank": 2})}
    everything = jpeft.fishpal.attach(candidates)
    fresh = jpeft.init(everything, key, toy.sites)

    def loss(leaves, example):
        ids, mask, label = example
        return -jax.nn.log_softmax(toy.logits(everything, leaves, ids=ids[None], mask=mask[None])[0])[label]

    information = jpeft.fisher(loss, fresh, (toy.ids, toy.mask, toy.labels))
    scores = jpeft.fishpal.scores(information, 4, candidates, {"unipelt": 1.0, "lora": 1.0})
    for layer in (0, 1):
        parts = [information["prefix_0"]["shared"]]
        parts += [own for name in ("prefix_0", "pfeiffer_0", "lora_0") for path, own in information[name].items()
                  if f"layer_{layer}/" in path]  # fmt: skip
        arrays = [np.asarray(x) for x in jax.tree.leaves(parts) if np.asarray(x).any()]
        expected = 4 * sum(x.sum() for x in arrays) / sum(x.size for x in arrays)
        np.testing.assert_allclose(scores[layer]["unipelt"], expected, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(jpeft.UserError, match="variant 'alp' is unknown"):
        unipelt("alp")
