"""Sites inside nn.scan, nn.vmap and nn.RNN: leaves go where the parameters go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import randomise

import jpeft
from jpeft import UserError
from jpeft.core.partition import split
from jpeft.core.transform import STACKED

D, L = 5, 3
X = jax.random.normal(jax.random.key(7), (4, D))
SERIES = jax.random.normal(jax.random.key(8), (2, 4, D))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(D, name="proj")(x)), None


class Scanned(nn.Module):
    """`L` layers in one scan, the way deep JAX models are written."""

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        scan = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=L)
        return nn.Dense(3, name="out")(scan(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(L):
            x, _ = Block(name=f"layer_{i}")(x)
        return nn.Dense(3, name="out")(x)


class Twice(nn.Module):
    """A scan inside a scan."""

    @nn.compact
    def __call__(self, x):
        inner = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return inner(name="inner")(x, None)[0], None

        outer = nn.scan(Outer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return outer(name="outer")(x, None)[0]


class Heads(nn.Module):
    """A Dense for each row of the input, or one for all of them."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        axes, split = {"params": None if self.shared else 0}, {"params": not self.shared}
        return nn.vmap(nn.Dense, variable_axes=axes, split_rngs=split)(D, name="heads")(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(6), name="rnn")(x)


class Repeated(nn.Module):
    """One block, `L` times."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=L)
        return scan(name="layers")(x, None)[0]


METHODS = {
    "lora": lambda targets: jpeft.lora(2, targets=targets),
    "dora": lambda targets: jpeft.dora(2, targets=targets),
    "pissa": lambda targets: jpeft.pissa(2, targets=targets),
    "krona": lambda targets: jpeft.krona(targets=targets),
    "ia3": lambda targets: jpeft.ia3(targets=targets),
    "bitfit": lambda targets: jpeft.bitfit(targets=targets),
    "random_mask": lambda targets: jpeft.random_mask(count=4, targets=targets),
    "said": lambda targets: jpeft.said(4, targets=targets),
}
MODELS = {
    "scan": (Scanned(), X, "proj"),
    "remat": (Scanned(remat=True), X, "proj"),
    "twice": (Twice(), X, "proj"),
    "heads": (Heads(), X, "heads"),
    "shared": (Heads(shared=True), X, "heads"),
    "rnn": (Recurrent(), SERIES, "i|h"),
    "repeated": (Repeated(), X, "proj"),
}


def moved(leaves):
    trained, fixed = split(leaves)
    return jpeft.union(fixed, jax.tree.map(lambda x: x + 0.3, trained))


def setting(name, method="lora"):
    model, x, targets = MODELS[name]
    params = randomise(jax.eval_shape(model.init, jax.random.key(0), x)["params"], 1)
    transform = METHODS[method](targets)
    return model, x, params, transform, jpeft.init(transform, jax.random.key(2), jpeft.sites(model, x), params)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("optimised")
def test_leaves_act_as_their_merged_model_does(name, jitted):
    model, x, params, method, leaves = setting(name)
    leaves = moved(leaves)
    apply = lambda params, leaves, x: jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
    wrapped = (jax.jit(apply) if jitted else apply)(params, leaves, x)
    merged = model.apply({"params": jpeft.merge(method, leaves, params).params}, x)
    assert np.abs(wrapped - model.apply({"params": params}, x)).max() > 0.05
    np.testing.assert_allclose(wrapped, merged, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_dense_layers_works_in_a_scan(method):
    model, x, params, transform, leaves = setting("scan", method)
    plain = model.apply({"params": params}, x)
    fresh = jpeft.apply(model, transform, {"params": params, "peft": leaves}, x)
    if method not in ("lora", "krona"):
        np.testing.assert_allclose(fresh, plain, atol=1e-5)
    leaves = moved(leaves)
    wrapped = jpeft.apply(model, transform, {"params": params, "peft": leaves}, x)
    assert np.abs(wrapped - plain).max() > 0.01
    merged = jpeft.merge(transform, leaves, params)
    assert merged.transform.members == ()
    np.testing.assert_allclose(wrapped, model.apply({"params": merged.params}, x), atol=1e-5)


def test_a_scan_gives_what_the_unrolled_layers_give():
    model, x, params, method, leaves = setting("scan")
    leaves = moved(leaves)
    stacked = leaves["lora_0"]["layers/proj"][STACKED]
    assert stacked["a"].shape == (L, D, 2)
    assert not np.allclose(stacked["a"][0], stacked["a"][1])  # a draw for each copy
    take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    apart = {f"layer_{i}": take(params["layers"], i) for i in range(L)} | {"out": params["out"]}
    own = {"lora_0": {f"layer_{i}/proj": take(stacked, i) for i in range(L)}}
    grad = lambda model, params, leaves: jax.grad(
        lambda leaves: (jpeft.apply(model, method, {"params": params, "peft": leaves}, x) ** 2).sum()
    )(leaves)
    scanned = grad(model, params, leaves)["lora_0"]["layers/proj"][STACKED]
    unrolled = grad(Unrolled(), apart, own)["lora_0"]
    for i in range(L):
        for name, x in unrolled[f"layer_{i}/proj"].items():
            assert np.linalg.norm(scanned[name][i] - x) < 1e-4 * np.linalg.norm(x)


def test_a_chain_shares_a_stacked_site():
    model, x, params, _, _ = setting("scan")
    method = jpeft.chain(jpeft.lora(2, targets="proj"), jpeft.ia3(targets="proj"))
    leaves = moved(jpeft.init(method, jax.random.key(2), jpeft.sites(model, x), params))
    wrapped = jpeft.apply(model, method, {"params": params, "peft": leaves}, x)
    merged = model.apply({"params": jpeft.merge(method, leaves, params).params}, x)
    np.testing.assert_allclose(wrapped, merged, atol=2e-6)


def test_each_copy_has_a_dropout_key_of_its_own():
    seen = []

    def wrap(leaves, site, call, args, ctx):
        jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), jax.random.key_data(ctx.key))
        return call(*args) + leaves["v"].reshape(1, 1)

    def init(key, sites, params):
        from jpeft.core.leaves import init_sites

        return init_sites(key, jpeft.find(sites, "proj"), lambda key, site: {"v": jnp.ones(1)})

    model, x, params, _, _ = setting("scan")
    method = jpeft.Transform("seen", init, wrap)
    leaves = jpeft.init(method, jax.random.key(0), jpeft.sites(model, x), params)
    for rngs in ({"dropout": jax.random.key(1)}, jax.random.key(1)):
        seen.clear()
        jpeft.apply(model, method, {"params": params, "peft": leaves}, x, rngs=rngs)
        jax.effects_barrier()
        assert len(set(seen)) == len(seen) == L


def test_what_cannot_work_is_an_error_that_says_what_to_pass():
    model = Scanned(axis=1)
    params = model.init(jax.random.key(0), X)["params"]
    with pytest.raises(UserError, match=r"layers/proj.*an axis other than the first: pass variable_axes="):
        jpeft.init(jpeft.lora(2, targets="proj"), jax.random.key(0), jpeft.sites(model, X), params)
    model, x, params, method, leaves = setting("repeated")
    stacked = {
        "lora_0": {
            "layers/proj": {STACKED: jax.tree.map(lambda a: jnp.stack([a] * L), leaves["lora_0"]["layers/proj"])}
        }
    }
    with pytest.raises(UserError, match="are stacked, but its parameters are not"):
        jpeft.apply(model, method, {"params": params, "peft": stacked}, x)
    with pytest.raises(UserError, match="stacked, which sparse_adapter does not support"):
        _in_scan(jpeft.sparse_adapter(bottleneck=2, targets="norm"))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, hidden, residual):
        return nn.LayerNorm()(hidden + residual)


class Residual(nn.Module):
    def setup(self):
        self.proj, self.norm = nn.Dense(D), Normed()

    def __call__(self, x, _=None):
        return self.norm(self.proj(x), x), None


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Residual, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
        return scan(name="layers")(x, None)[0]


def _in_scan(method):
    model = Deep()
    params = model.init(jax.random.key(0), X)["params"]
    return model, params, jpeft.init(method, jax.random.key(1), jpeft.sites(model, X), params)


@pytest.mark.parametrize("method", [jpeft.houlsby(2, targets="norm"), jpeft.adamix(2, 2, targets="norm")])
def test_adapters_work_in_a_scan_and_fold_there(method):
    model, params, leaves = _in_scan(method)
    leaves = moved(leaves)
    wrapped = jpeft.apply(model, method, {"params": params, "peft": leaves}, X)
    assert np.abs(wrapped - model.apply({"params": params}, X)).max() > 0.01
    folded = jpeft.apply(model, method, {"params": params, "peft": jpeft.fold(method, leaves)}, X)
    np.testing.assert_allclose(wrapped, folded, atol=1e-5)
