"""Any two methods, in both orders: what `merge` leaves gives the logits of the chain."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import randomise

import jpeft
from jpeft.core.partition import split
from jpeft.transforms.iti import Probes, iti

D = 8


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="output")(nn.gelu(nn.Dense(12, name="intermediate")(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="LayerNorm")(x + FeedForward(name="ffn")(jnp.tanh(nn.Dense(D, name="query")(x))))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(Layer(name="layer_0")(x))


X = jax.random.normal(jax.random.key(7), (4, 3, D))
NET = Net()
PARAMS = randomise(jax.eval_shape(lambda: NET.init(jax.random.key(0), X)["params"]), 1, 0.3)
SITES = jpeft.sites(NET, X)
DENSE = "query|intermediate"
PROBES = Probes(np.ones((1, 2)), np.full((1, 2, D // 2), 0.5), np.full((1, 2), 0.02))
METHODS = {
    "bitfit": jpeft.bitfit(),
    "dora": jpeft.dora(2, targets=DENSE),
    "far": jpeft.far(0.5),
    "fish": jpeft.fish(0.2),
    "gated": jpeft.lora(2, targets=DENSE, gate=True),
    "ia3": jpeft.ia3(targets=DENSE),
    "iti": iti(PROBES, 2, targets="query"),
    "krona": jpeft.krona(targets=DENSE),
    "layer_norm": jpeft.layer_norm(),
    "lora": jpeft.lora(2, targets=DENSE),
    "magnitude_mask": jpeft.magnitude_mask(0.2),
    "parallel": jpeft.parallel(2, targets="query"),
    "pissa": jpeft.pissa(2, targets=DENSE),
    "random_mask": jpeft.random_mask(0.2),
    "rslora": jpeft.rslora(2, targets=DENSE),
    "said": jpeft.said(4, targets=DENSE),
    "top_k_layers": jpeft.top_k_layers(1),
}
STAY = ("gated", "parallel")


@functools.cache
def leaves_of(name, seed):
    """Leaves that have moved, so that the method does something."""
    (own,) = jpeft.init(METHODS[name], jax.random.key(seed), SITES, PARAMS).values()
    trained, fixed = split(own)
    return jpeft.union(fixed, jax.tree.map(lambda x, r: x + r, trained, randomise(trained, seed, 0.2)))


@pytest.mark.parametrize("outer", METHODS)
def test_merged_or_kept_any_two_give_the_same(outer):
    base = NET.apply({"params": PARAMS}, X)
    for inner in METHODS:
        chain = jpeft.chain(METHODS[inner], METHODS[outer])
        leaves = dict(zip(jpeft.instances(chain), (leaves_of(inner, 3), leaves_of(outer, 4)), strict=True))
        wrapped = jpeft.apply(NET, chain, {"params": PARAMS, "peft": leaves}, X)
        merged = jpeft.merge(chain, leaves, PARAMS)
        served = jpeft.apply(NET, merged.transform, {"params": merged.params, "peft": merged.leaves}, X)
        assert jnp.abs(wrapped - base).max() > 0.01, inner
        np.testing.assert_allclose(served, wrapped, atol=1e-5 * (1 + jnp.abs(wrapped).max()), err_msg=inner)
        if not {inner, outer}.intersection((*STAY, "dora")):
            assert merged.transform.members == (), inner
