"""Chains and plans against a BERT written out in plain jnp, with every method inserted by hand where it belongs."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, randomised

import jpeft
from jpeft.models import Bert, BertConfig
from jpeft.plans.plan import Entry, build

SIZES = {
    "houlsby": {"bottleneck": 3},
    "ia3": {"placement": "before"},
    "lora": {"rank": 2},
    "parallel": {"bottleneck": 3},
    "pfeiffer": {"bottleneck": 3},
    "prefix": {"num_virtual_tokens": 2, "mlp_hidden": 4},
}
PAIRS = [("lora", "ia3"), ("houlsby", "pfeiffer"), ("parallel", "ia3"), ("prefix", "lora"), ("lora", "lora")]


def linear(x, p):
    return x @ p["kernel"] + p["bias"][None, None]


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * p["scale"][None, None] + p["bias"][None, None]


def bottleneck(x, p, f):
    return linear(f(linear(x, p["down"])), p["up"])


def reference(toy, modules):
    """Logits of a BERT with `modules`: {layer: [(method, leaves of the instance), ...]} in the order of the chain."""
    p = toy.params
    b, t = toy.ids.shape
    e = p["embeddings"]
    x = e["word_embeddings"]["embedding"][toy.ids] + e["position_embeddings"]["embedding"][:t][None]
    x = norm(x + e["token_type_embeddings"]["embedding"][0][None, None], e["LayerNorm"])
    for i in range(toy.model.config.num_hidden_layers):
        at, here, layer = f"encoder/layer_{i}", modules.get(i, []), p["encoder"][f"layer_{i}"]

        def dense(x, part, name, at=at, here=here, layer=layer):
            path, y = f"{at}/{part}/{name}", linear(x, layer[part][name])
            for method, leaves in here:
                own = leaves.get(path)
                if method == "lora" and own:
                    y = y + 16 / 2 * x @ own["a"] @ own["b"]
                if method == "ia3" and own:
                    y = y * own["scale"][None, None]
            return y

        def add_norm(name, at=at, here=here, layer=layer):
            def plain(h, r):
                return norm(h + r, layer[name]["LayerNorm"])

            inner = plain
            for method, leaves in here:
                own = leaves.get(f"{at}/{name}")
                if method == "houlsby":
                    inner = lambda h, r, f=inner, own=own: f(h + bottleneck(h, own, jax.nn.swish), r)
                if method == "pfeiffer" and own:
                    inner = lambda h, r, f=inner, own=own: f(h + bottleneck(f(h, r), own, jax.nn.relu), r)
            return inner

        q, k, v = (dense(x, "attention", name) for name in ("query", "key", "value"))
        sees = toy.mask[:, None, None, :] > 0
        for method, leaves in here:
            if method == "prefix":
                shared, own = leaves["shared"], leaves[f"{at}/attention/core"]
                hidden = jnp.tanh(linear(shared["embedding"][None], shared["mlp"]))
                k, v = (
                    jnp.concatenate([jnp.tile(linear(hidden, own[name]), (b, 1, 1)), y], 1)
                    for name, y in (("key", k), ("value", v))
                )
                sees = jnp.concatenate([jnp.ones((b, 1, 1, hidden.shape[1]), bool), sees], -1)
        q, k, v = (y.reshape(b, -1, 2, 8).transpose(0, 2, 1, 3) for y in (q, k, v))
        scores = jnp.where(sees, q @ k.transpose(0, 1, 3, 2) / np.sqrt(8), -1e30)
        context = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(b, t, 16)
        x = add_norm("attention_add_norm")(dense(context, "attention", "output"), x)
        y = dense(jax.nn.gelu(dense(x, "ffn", "intermediate"), approximate=False), "ffn", "output")
        for method, leaves in here:
            if method == "parallel":
                y = y + 4 * bottleneck(x, leaves[f"{at}/ffn"], jax.nn.relu)
        x = add_norm("ffn_add_norm")(y, x)
    pooled = jnp.tanh(x[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"][None])
    return pooled @ p["classifier"]["kernel"] + p["classifier"]["bias"][None]


def check(toy, plan):
    """Equal logits, and the plan's own order in every layer."""
    method = build(plan)
    leaves = randomised(jpeft.init(method, jax.random.key(0), toy.sites, toy.params), scale=0.5)
    modules = {}
    for layer in plan:
        found = [
            (member.name, leaves[name])
            for name, member in jpeft.instances(method).items()
            if any(f"/layer_{layer}/" in path for path in leaves[name])
        ]
        assert [name for name, _ in found] == [entry.method for entry in plan[layer]]
        modules[layer] = found
    got = jax.jit(lambda leaves: toy.logits(method, leaves))(leaves)
    np.testing.assert_allclose(got, reference(toy, modules), atol=5e-5)
    return got


@pytest.fixture(scope="module")
def one_layer(toy):
    model = Bert(BertConfig(**{**vars(toy.model.config), "num_hidden_layers": 1}))
    params = {**toy.params, "encoder": {"layer_0": toy.params["encoder"]["layer_0"]}}
    return Toy(model, params, toy.ids, toy.mask, toy.labels, jpeft.sites(model, toy.ids, toy.mask))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs_in_both_orders(one_layer, pair):
    for order in (pair, pair[::-1]):
        check(one_layer, {0: [Entry(name, SIZES[name]) for name in order]})


def test_the_order_of_two_that_meet_matters(one_layer):
    """On the same leaves: (x W + x A B) s is not x W s + x A B."""
    lora, ia3 = jpeft.lora(2, targets="value"), jpeft.ia3(targets="attention/value")
    leaves = randomised(jpeft.init(jpeft.chain(lora, ia3), jax.random.key(0), one_layer.sites, one_layer.params))
    one = one_layer.logits(jpeft.chain(lora, ia3), leaves)
    two = one_layer.logits(jpeft.chain(ia3, lora), leaves)
    assert jnp.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_random_plans(toy, seed):
    rng = random.Random(seed)
    plan = {layer: [Entry(n, SIZES[n]) for n in rng.sample(sorted(SIZES), rng.randint(1, 4))] for layer in range(2)}
    check(toy, plan)


def test_all_at_once_differ_from_each_alone(toy):
    everything = {layer: [Entry(name, SIZES[name]) for name in SIZES] for layer in range(2)}
    got = check(toy, everything)
    for one, two in itertools.combinations(range(3), 2):
        assert jnp.abs(got[one] - got[two]).max() > 1e-4
