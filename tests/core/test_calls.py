"""Ways of calling a model, and models of others: keywords, methods, keys, `nn.jit`, Flax's attention, bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import PARAMS, SITES, D, JitBlock, Net, X, leaves_of, randomise

import jpeft
from jpeft import UserError
from jpeft.core import hook

LORA = jpeft.lora(2, targets="proj")


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-6)


class Autoencoder(nn.Module):
    """A model whose `encode` does not go where the leaves of its decoder sit."""

    def setup(self):
        self.encoder, self.decoder = nn.Dense(D), nn.Dense(D)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return jnp.tanh(self.encoder(x))


@pytest.mark.parametrize("method", ["encode", Autoencoder.encode])
def test_another_method_than_call(method):
    model = Autoencoder()
    params = randomise(jax.eval_shape(model.init, jax.random.key(0), X)["params"], 1)
    lora = jpeft.lora(2, targets="encoder|decoder")
    leaves = randomise(jpeft.init(lora, jax.random.key(1), jpeft.sites(model, X), params), 2)
    variables = {"params": params, "peft": leaves}
    merged = {"params": jpeft.merge(lora, leaves, params).params}
    close(jpeft.apply(model, lora, variables, X, method=method), model.apply(merged, X, method=method))
    close(jpeft.apply(model, lora, variables, X), model.apply(merged, X))
    nowhere = {"lora_0": {**leaves["lora_0"], "decodr": leaves["lora_0"]["decoder"]}}
    with pytest.raises(UserError, match="leaves for site 'decodr', which the model does not have"):
        jpeft.apply(model, lora, {"params": params, "peft": nowhere}, X, method=method)


class ByKeyword(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(inputs=nn.tanh(nn.Dense(D, name="proj")(inputs=x)))


def test_arguments_by_keyword():
    model = ByKeyword()
    params = randomise(jax.eval_shape(lambda: model.init(jax.random.key(0), x=X)["params"]), 1)
    sites = jpeft.sites(model, x=X)
    assert sites["proj"].args[0].shape == X.shape
    leaves = randomise(jpeft.init(LORA, jax.random.key(1), sites, params), 2)
    wrapped = jpeft.apply(model, LORA, {"params": params, "peft": leaves}, x=X)
    close(wrapped, model.apply({"params": jpeft.merge(LORA, leaves, params).params}, x=X))
    assert np.abs(wrapped - model.apply({"params": params}, x=X)).max() > 0.01


def test_one_key_for_all():
    lora = jpeft.lora(2, targets="proj", dropout=0.5)
    variables, key = {"params": PARAMS, "peft": leaves_of(lora)}, jax.random.key(3)
    one, named = (jpeft.apply(Net(), lora, variables, X, rngs=rngs) for rngs in (key, {"dropout": key}))
    close(one, named)
    assert np.abs(one - jpeft.apply(Net(), lora, variables, X)).max() > 0.01


@pytest.mark.parametrize("mutable", [True, ["params"], "params", ["batch_stats"]])
def test_mutable_collections_hold_nothing_of_ours(mutable):
    variables = {"params": PARAMS, "peft": leaves_of(LORA)}
    out, changed = jpeft.apply(Net(), LORA, variables, X, mutable=mutable)
    close(out, jpeft.apply(Net(), LORA, variables, X))
    if "params" in changed:
        assert jax.tree.structure(changed["params"]) == jax.tree.structure(PARAMS)


def test_an_eager_nn_jit_model_lists_its_sites_once(monkeypatch):
    """A cached trace does not call the hook, so what was not reached has to be looked up: once."""
    calls, real = [], hook.sites
    monkeypatch.setattr(hook, "sites", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    hook._listed.cache_clear()
    model, variables = Net(JitBlock), {"params": PARAMS, "peft": leaves_of(LORA)}
    wanted = jpeft.apply(Net(), LORA, variables, X)
    for _ in range(4):
        close(jpeft.apply(model, LORA, variables, X), wanted)
    assert len(calls) <= 1


class Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, out_features=D, name="attention")(x)


SERIES = jax.random.normal(jax.random.key(1), (2, 4, D))
ATTENDS = Attends()
WEIGHTS = randomise(jax.eval_shape(lambda: ATTENDS.init(jax.random.key(0), SERIES)["params"]), 1)
DENSE = {
    "lora": jpeft.lora(2, targets="query|value|out"),
    "rslora": jpeft.rslora(2, targets="query|value|out"),
    "dora": jpeft.dora(2, targets="query|value|out"),
    "pissa": jpeft.pissa(2, targets="query|value|out"),
    "krona": jpeft.krona(targets="query|value|out"),
    "ia3": jpeft.ia3(targets="query|value|out"),
}


@pytest.mark.parametrize("name", DENSE)
def test_flax_s_own_attention(name):
    """Kernels [d, heads, k] and [heads, k, d]: what a method makes of them is what its merged model makes."""
    method = DENSE[name]
    leaves = jpeft.init(method, jax.random.key(2), jpeft.sites(ATTENDS, SERIES), WEIGHTS)
    plain = ATTENDS.apply({"params": WEIGHTS}, SERIES)
    if name != "krona":
        close(jpeft.apply(ATTENDS, method, {"params": WEIGHTS, "peft": leaves}, SERIES), plain)
    parts = jpeft.partition(method, WEIGHTS, leaves)
    moved = jpeft.union(parts.frozen, {"params": {}, "peft": jax.tree.map(lambda x: x + 0.1, parts.trainable["peft"])})
    wrapped = jpeft.apply(ATTENDS, method, moved, SERIES)
    assert np.abs(wrapped - plain).max() > 0.01
    merged = jpeft.merge(method, moved["peft"], WEIGHTS)
    assert merged.transform.members == ()
    np.testing.assert_allclose(wrapped, ATTENDS.apply({"params": merged.params}, SERIES), atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_a_base_in_bfloat16(name):
    """Leaves are computed and stored in float32; merged parameters have the base's dtype."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    options = {"targets": "proj"} if name in ("krona", "ia3") else {"rank": 2, "targets": "proj"}
    method = getattr(jpeft, name)(**options)
    leaves = jpeft.init(method, jax.random.key(2), SITES, params)
    assert {x.dtype for x in jax.tree.leaves(leaves)} == {jnp.dtype("float32")}
    merged = jpeft.merge(method, leaves, params).params
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact = jpeft.merge(method, leaves, wide).params
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(exact), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


def test_an_nnx_module_is_refused_by_name():
    from flax import nnx

    with pytest.raises(UserError, match="Linear is an NNX module, which is not supported yet"):
        jpeft.sites(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), X)
    with pytest.raises(UserError, match=r"expected a flax\.linen module, got int"):
        jpeft.apply(3, LORA, {}, X)


class Transformer(nn.Module):
    """A plain linen transformer that knows nothing of jpeft."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.LayerNorm(name=f"norm_{i}")(x + nn.Dense(D, name=f"layer_{i}")(x))
        return nn.Dense(2, name="head")(x)


PLAIN = jpeft.sites(Transformer(), SERIES)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jpeft.lora(2), r"the Dense layers of this model are 'layer_0' \(Dense, \[2, 4, 5\] to \[2, 4, 5\]\)"),
        (jpeft.pfeiffer(2), r"this model has no sites with arguments \(hidden, residual\)"),
        (jpeft.pfeiffer(2, targets="head"), r"'head' \(Dense, .* is not one of the sites with arguments \(hidden, res"),
        (jpeft.parallel(2, targets="head"), r"'head' .* is not one of the sites that map .*: .* are 'layer_0'"),
        (jpeft.prefix(2, 4), "this model has no sites with arguments"),
        (jpeft.prompt(2, "random"), "this model has no sites with arguments"),
        (jpeft.ladder_side(2, "random"), "this model has no sites with arguments"),
        (jpeft.far(), "this model has no modules with two Dense layers"),
    ],
)
def test_an_error_names_the_sites_that_would_do(method, message):
    with pytest.raises(UserError, match=message):
        jpeft.init(method, jax.random.key(0), PLAIN)


def test_every_suitable_site_by_one_pattern():
    assert set(jpeft.init(jpeft.lora(2, targets=".*"), jax.random.key(0), PLAIN)["lora_0"]) == {
        "layer_0", "layer_1", "head",
    }  # fmt: skip
    params = Transformer().init(jax.random.key(0), SERIES)["params"]
    norms = jpeft.init(jpeft.layer_norm(), jax.random.key(0), PLAIN, params)["layer_norm_0"]
    assert set(norms) == {"norm_0", "norm_1"}
    biases = jpeft.init(jpeft.bitfit(), jax.random.key(0), PLAIN, params)["bitfit_0"]
    assert len(biases) == 5


def test_equal_blocks_under_nn_jit_have_their_own_places():
    """Flax traces equal blocks once, unless something static differs."""
    method = jpeft.lora(2, targets="proj", alpha_pattern={"blocks_1/proj": 64.0})
    variables = {"params": PARAMS, "peft": leaves_of(method)}
    np.testing.assert_allclose(
        jpeft.apply(Net(JitBlock), method, variables, X), jpeft.apply(Net(), method, variables, X), atol=1e-5
    )


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.Dense(D, name="proj")(x)
        return y if mask is None else y * mask


def test_a_mask_is_the_models_too_where_it_has_such_an_argument():
    model, mask = Masked(), np.arange(len(X))[:, None] < 1
    params = model.init(jax.random.key(0), X)["params"]
    method = jpeft.lora(2, targets="proj")
    variables = {"params": params, "peft": jpeft.init(method, jax.random.key(1), jpeft.sites(model, X), params)}
    wanted = model.apply({"params": params}, X, mask)
    assert np.abs(wanted - model.apply({"params": params}, X)).max() > 0.1
    for given in ((X,), (X, mask)):
        np.testing.assert_array_equal(jpeft.apply(model, method, variables, *given, mask=mask), wanted)
    for called in ("__call__", Masked.__call__, model.__call__):
        np.testing.assert_array_equal(jpeft.apply(model, method, variables, X, mask=mask, method=called), wanted)
