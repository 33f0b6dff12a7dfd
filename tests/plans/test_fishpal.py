import jax
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft import Entry, UserError
from jpeft.plans import fishpal

CANDIDATES = {
    "prefix": Entry("prefix", {"num_virtual_tokens": 2, "mlp_hidden": 4}),
    "pfeiffer": Entry("pfeiffer", {"bottleneck": 3}),
    "lora": Entry("lora", {"rank": 2}),
}
FACTORS = {"prefix": 100.0, "pfeiffer": 5.0, "lora": 1.0}


@pytest.fixture(scope="module")
def gradients(toy):
    """One gradient tree per example, at initialisation, by a plain loop."""
    method = fishpal.attach(CANDIDATES)
    leaves = jpeft.init(method, jax.random.key(5), toy.sites)

    @jax.jit
    @jax.grad
    def grad(leaves, ids, mask, label):
        return -jax.nn.log_softmax(toy.logits(method, leaves, ids=ids[None], mask=mask[None])[0])[label]

    return [grad(leaves, *row) for row in zip(toy.ids, toy.mask, toy.labels, strict=True)]


def mean_of_squares(gradients):
    return jax.tree.map(lambda *g: sum(x**2 for x in g) / len(g), *gradients)


def test_scores_equal_the_rule_of_the_thesis_in_plain_numpy(gradients):
    scores = fishpal.scores(mean_of_squares(gradients), len(gradients), CANDIDATES, FACTORS)
    squares = lambda pick: sum(np.asarray(pick(g), np.float64) ** 2 for g in gradients).ravel()
    for layer in (0, 1):
        at = f"encoder/layer_{layer}"
        lora = [squares(lambda g, w=w: g["lora_0"][f"{at}/attention/{w}"]["b"]) for w in ("query", "value")]
        adapter = [
            squares(lambda g, a=a, b=b: g["pfeiffer_0"][f"{at}/ffn_add_norm"][a][b])
            for a in ("down", "up")
            for b in ("kernel", "bias")
        ]
        core = lambda g, at=at: g["prefix_0"][f"{at}/attention/core"]
        prefix = [squares(lambda g, a=a, b=b: core(g)[a][b]) for a in ("key", "value") for b in ("kernel", "bias")]
        prefix += [squares(lambda g: g["prefix_0"]["shared"]["embedding"])]
        prefix += [squares(lambda g, b=b: g["prefix_0"]["shared"]["mlp"][b]) for b in ("kernel", "bias")]
        for name, parts in (("lora", lora), ("pfeiffer", adapter), ("prefix", prefix)):
            wanted = FACTORS[name] * np.concatenate(parts).mean()
            assert scores[layer][name] == pytest.approx(wanted, rel=1e-5)
            assert wanted > 0


def test_loras_a_has_no_gradient_and_does_not_dilute_the_mean(gradients):
    fisher = mean_of_squares(gradients)
    for leaf in fisher["lora_0"].values():
        assert not leaf["a"].any()
    without = {**fisher, "lora_0": {path: {"b": leaf["b"]} for path, leaf in fisher["lora_0"].items()}}
    one, other = (fishpal.scores(f, 4, CANDIDATES, FACTORS) for f in (fisher, without))
    assert one == other


def test_factors_and_the_number_of_examples_scale(gradients):
    fisher = mean_of_squares(gradients)
    one, four = (fishpal.scores(fisher, n, CANDIDATES, FACTORS) for n in (1, 4))
    assert four[1]["prefix"] == pytest.approx(4 * one[1]["prefix"])
    plain = fishpal.scores(fisher, 1, CANDIDATES, {})
    assert one[1]["prefix"] == pytest.approx(100 * plain[1]["prefix"])
    with pytest.raises(UserError, match="factor for 'lroa', which is not a candidate"):
        fishpal.scores(fisher, 1, CANDIDATES, {"lroa": 2.0})


def test_the_default_factors_are_those_of_the_thesis():
    assert fishpal.FACTORS == {"prefix": 10_000, "pfeiffer": 5, "lora": 1}
    assert list(fishpal.CANDIDATES) == ["prefix", "pfeiffer", "lora"]


def test_choose_keeps_the_best_and_the_first_of_equals():
    table = {0: {"prefix": 1.0, "pfeiffer": 3.0, "lora": 2.0}, 1: {"prefix": 2.0, "pfeiffer": 1.0, "lora": 2.0}}
    assert fishpal.choose(table, CANDIDATES) == {0: [CANDIDATES["pfeiffer"]], 1: [CANDIDATES["prefix"]]}
    with pytest.raises(UserError, match="no candidate of layer 0 has any score"):
        fishpal.choose({0: {"prefix": 0.0, "pfeiffer": 0.0, "lora": 0.0}}, CANDIDATES)


def test_what_lost_is_not_in_the_graph_and_what_won_starts_where_it_was_measured(toy):
    key = jax.random.key(5)
    plan = fishpal.choose({0: {"pfeiffer": 1.0, "lora": 0.5}, 1: {"pfeiffer": 0.1, "lora": 0.5}}, CANDIDATES)
    kept = jpeft.init(jpeft.build(plan), key, toy.sites)
    measured = jpeft.init(fishpal.attach(CANDIDATES), key, toy.sites)
    assert {instance: sorted(leaves) for instance, leaves in kept.items()} == {
        "pfeiffer_0": ["encoder/layer_0/ffn_add_norm"],
        "lora_0": ["encoder/layer_1/attention/query", "encoder/layer_1/attention/value"],
    }
    for instance, leaves in kept.items():
        for path, leaf in leaves.items():
            jax.tree.map(np.testing.assert_array_equal, leaf, measured[instance][path])


def test_any_set_of_candidates(toy):
    candidates = {
        "small": Entry("lora", {"rank": 1}),
        "large": Entry("lora", {"rank": 3}),
        "houlsby": Entry("houlsby", {"bottleneck": 2}),
        "parallel": Entry("parallel", {"bottleneck": 2}),
    }
    leaves = randomised(jpeft.init(fishpal.attach(candidates), jax.random.key(0), toy.sites))
    scores = fishpal.scores(jax.tree.map(np.square, leaves), 1, candidates, {"large": 2.0})
    assert set(scores[0]) == set(candidates)
    assert min(scores[1].values()) > 0
    with pytest.raises(UserError, match="at least one candidate"):
        fishpal.attach({})


def test_by_hand_on_numbers():
    """Shared leaves count in every layer; a leaf counts with all its entries as soon as one is not zero."""
    small = {name: CANDIDATES[name] for name in ("prefix", "lora")}
    paths = [f"encoder/layer_{i}/attention" for i in (0, 1)]
    fisher = {
        "prefix_0": {
            "shared": {"embedding": np.full((2, 4), 3.0)},
            **{f"{path}/core": {"key": np.full((1, 2), 1.0 + i)} for i, path in enumerate(paths)},
        },
        "lora_0": {f"{path}/query": {"a": np.zeros((3, 2)), "b": np.full((2, 3), 2.0)} for path in paths},
    }
    fisher["lora_0"][f"{paths[1]}/query"]["a"][0, 0] = 6.0
    assert fishpal.scores(fisher, 10, small, {}) == {
        0: {"prefix": pytest.approx(10 * (24 + 2) / 10), "lora": pytest.approx(10 * 2.0)},
        1: {"prefix": pytest.approx(10 * (24 + 4) / 10), "lora": pytest.approx(10 * (12 + 6) / 12)},
    }
    silent = jax.tree.map(np.zeros_like, fisher)
    assert fishpal.scores(silent, 10, small, {}) == {i: {"prefix": 0.0, "lora": 0.0} for i in (0, 1)}
    fisher["lora_0"]["pooler"] = {"b": np.ones((2, 3))}
    with pytest.raises(UserError, match="'lora' has leaves at 'pooler', which is not in a layer"):
        fishpal.scores(fisher, 10, small, {})
