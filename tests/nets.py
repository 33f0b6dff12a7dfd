"""A linen model that never heard of jpeft, and toy transforms whose composition can be written by hand."""

import flax.linen as nn
import jax
import numpy as np

import jpeft
from jpeft.core.leaves import init_sites
from jpeft.core.site import find
from jpeft.core.transform import Transform

D = 5


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(D, name="proj")(x))


JitBlock = nn.jit(Block)
RematBlock = nn.remat(Block)


class Net(nn.Module):
    """A user's model: two blocks and an output."""

    block: type = Block

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = self.block(name=f"blocks_{i}")(x)
        x = nn.Dropout(0.5)(x, deterministic=not train)
        return nn.Dense(3, name="out")(x)


def randomise(tree, seed, scale=0.5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(np.asarray(scale * rng.normal(size=x.shape), x.dtype)), tree)


def toy(name, wrap, targets="proj", layers=None, merge=None, fold=None):
    """One vector as wide as the site's output for each site."""

    def init(key, sites, params):
        def make(key, site):
            return {"v": jax.random.normal(key, (1, site.params["kernel"].shape[-1]))}

        return init_sites(key, find(sites, targets, layers), make)

    return Transform(name, init, wrap, merge, fold)


def scaled(**options):
    return toy("scaled", lambda leaves, site, call, args, ctx: call(*args) * leaves["v"], **options)


def shifted(**options):
    return toy("shifted", lambda leaves, site, call, args, ctx: call(*args) + leaves["v"], **options)


def dense(p, x):
    return np.asarray(x, np.float64) @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)[None]


def by_hand(params, x, at_proj):
    """The forward pass of `Net`, with at_proj(path, x, y) in place of the result y of each block's Dense on x."""
    for i in range(2):
        y = dense(params[f"blocks_{i}"]["proj"], x)
        x = np.tanh(at_proj(f"blocks_{i}/proj", np.asarray(x, np.float64), y))
    return dense(params["out"], x)


X = jax.random.normal(jax.random.key(7), (4, D))
NET = Net()
PARAMS = randomise(jax.eval_shape(lambda: NET.init(jax.random.key(0), X)["params"]), 1)
SITES = jpeft.sites(NET, X)
BLOCKS = {"plain": Block, "jit": JitBlock, "remat": RematBlock}


def leaves_of(transform, seed=2):
    return randomise(jpeft.init(transform, jax.random.key(0), SITES, PARAMS), seed)


def run(transform, leaves, model=NET, params=PARAMS, **options):
    return jpeft.apply(model, transform, {"params": params, "peft": leaves}, X, **options)
