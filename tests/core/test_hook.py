"""The hook under every transformation of JAX."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import (
    BLOCKS,
    NET,
    PARAMS,
    SITES,
    D,
    JitBlock,
    Net,
    X,
    by_hand,
    dense,
    leaves_of,
    randomise,
    run,
    scaled,
    shifted,
)

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.site import find
from jpeft.core.transform import SHARED, Transform, site_key

METHOD = jpeft.chain(jpeft.lora(2, targets="proj"), scaled())


def wanted_of_method(leaves, x=X):
    def at_proj(path, x, y):
        low = {name: np.asarray(v, np.float64) for name, v in leaves["lora_0"][path].items()}
        return (y + 8.0 * x @ low["a"] @ low["b"]) * np.asarray(leaves["scaled_0"][path]["v"])

    return by_hand(PARAMS, x, at_proj)


@pytest.mark.parametrize("block", BLOCKS)
def test_apply_and_its_gradient(block):
    """Eagerly and jitted, with plain, jitted and rematerialised blocks."""
    model = Net(BLOCKS[block])
    leaves = leaves_of(METHOD)
    wanted = wanted_of_method(leaves)
    assert np.abs(wanted - NET.apply({"params": PARAMS}, X)).max() > 0.1
    np.testing.assert_allclose(run(METHOD, leaves, model), wanted, rtol=1e-4, atol=1e-5)

    def loss(leaves):
        out = run(METHOD, leaves, model)
        return (out**2).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(leaves)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    direction = randomise(leaves, 9)
    step = 1e-6
    plus, minus = (
        wanted_of_method(
            jax.tree.map(lambda x, d, s=s: np.asarray(x, np.float64) + s * np.asarray(d), leaves, direction)
        )
        for s in (step, -step)
    )
    slope = ((plus**2).sum() - (minus**2).sum()) / (2 * step)
    dot = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    assert dot == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("jit", [False, True])
def test_transforms_that_differ_only_in_a_constant_are_not_confused(block, jit):
    """Same sites, same leaves: what was compiled for the one must not serve the other."""
    model = Net(BLOCKS[block])
    leaves = leaves_of(jpeft.lora(2, targets="proj"))

    def forward(leaves, alpha):
        return run(jpeft.lora(2, alpha, targets="proj"), leaves, model)

    fn = jax.jit(forward, static_argnums=1) if jit else forward
    for alpha in (1.0, 4.0, 1.0):

        def at_proj(path, x, y, alpha=alpha):
            low = {name: np.asarray(v, np.float64) for name, v in leaves["lora_0"][path].items()}
            return y + alpha / 2 * x @ low["a"] @ low["b"]

        np.testing.assert_allclose(fn(leaves, alpha), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)


def test_the_same_model_with_and_without():
    """Entering and leaving the hook leaves nothing behind."""
    model = Net(JitBlock)
    plain = np.asarray(model.apply({"params": PARAMS}, X))
    leaves = leaves_of(scaled())
    assert np.abs(run(scaled(), leaves, model) - plain).max() > 0.1
    np.testing.assert_array_equal(model.apply({"params": PARAMS}, X), plain)


def test_vmap_over_leaves():
    many = [leaves_of(METHOD, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    together = jax.jit(jax.vmap(lambda leaves: run(METHOD, leaves)))(stacked)
    for out, leaves in zip(together, many, strict=True):
        np.testing.assert_allclose(out, wanted_of_method(leaves), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_by_example(block):
    leaves = leaves_of(METHOD)

    def loss(leaves, x):
        out = jpeft.apply(Net(BLOCKS[block]), METHOD, {"params": PARAMS, "peft": leaves}, x[None])
        return jax.nn.log_softmax(out)[0, 0]

    together = jax.vmap(jax.grad(loss), (None, 0))(leaves, X)
    one = jax.jit(jax.grad(loss))
    for i in range(len(X)):
        chex.assert_trees_all_close(jax.tree.map(lambda g, i=i: g[i], together), one(leaves, X[i]), atol=2e-6)


def test_a_step_is_traced_once():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(leaves, params, x):
        return jpeft.apply(NET, METHOD, {"params": params, "peft": leaves}, x)

    for seed in range(3):
        leaves = leaves_of(METHOD, seed)
        np.testing.assert_allclose(step(leaves, PARAMS, X), wanted_of_method(leaves), rtol=1e-4, atol=1e-5)


def test_the_arguments_of_model_apply_pass_through(key):
    class Noted(nn.Module):
        @nn.compact
        def __call__(self, x, *, factor):
            y = nn.Dense(D, name="proj")(x)
            self.sow("intermediates", "seen", y)
            return factor * y

        def doubled(self, x):
            return self(x, factor=2.0)

    model = Noted()
    params = randomise(jax.eval_shape(lambda: model.init(key, X, factor=1.0)["params"]), 3)
    method = shifted()
    leaves = randomise(jpeft.init(method, key, jpeft.sites(model, X, factor=1.0)), 4)
    variables = {"params": params, "peft": leaves}
    y = dense(params["proj"], X) + np.asarray(leaves["shifted_0"]["proj"]["v"])
    out, state = jpeft.apply(model, method, variables, X, factor=3.0, mutable="intermediates")
    np.testing.assert_allclose(out, 3 * y, rtol=1e-5, atol=1e-5)
    assert set(state) == {"intermediates"}
    np.testing.assert_allclose(state["intermediates"]["seen"][0], y, rtol=1e-5, atol=1e-5)
    out = jpeft.apply(model, method, variables, X, method="doubled")
    np.testing.assert_allclose(out, 2 * y, rtol=1e-5, atol=1e-5)


# What is refused.


@pytest.mark.parametrize("leaves", [{}, {"scaled_1": {}}, {"scaled_0": {}, "shifted_0": {}}])
def test_leaves_of_another_transform(leaves):
    with pytest.raises(UserError, match=r"do not fit a transform with \['scaled_0'\]"):
        run(scaled(), leaves)
    with pytest.raises(UserError, match="do not fit"):
        jpeft.apply(NET, scaled(), {"params": PARAMS}, X)


@pytest.mark.parametrize("jit", [False, True])
def test_leaves_for_a_site_that_the_model_lacks(jit):
    leaves = leaves_of(scaled())
    leaves["scaled_0"]["blocks_2/proj"] = leaves["scaled_0"]["blocks_1/proj"]
    fn = jax.jit(lambda leaves: run(scaled(), leaves)) if jit else lambda leaves: run(scaled(), leaves)
    with pytest.raises(UserError, match=r"'blocks_2/proj', which the model does not have: did you mean 'blocks_"):
        fn(leaves)


def test_init_without_a_place(key):
    with pytest.raises(UserError, match="did you mean 'proj'"):
        jpeft.init(scaled(targets="prj"), key, SITES)


# What a wrap is given.


def test_context():
    seen = []

    def init(key, sites, params):
        return {SHARED: {"s": jnp.zeros(3)}, "blocks_0/proj": {"own": jnp.zeros(2)}, "blocks_1/proj": {}}

    def wrap(leaves, site, call, args, ctx):
        seen.append((leaves, site, args, ctx))
        return call(*args)

    method = Transform("spy", init, wrap)
    leaves = {"spy_0": {SHARED: {"s": jnp.arange(3.0)}, "blocks_0/proj": {"own": jnp.ones(2)}, "blocks_1/proj": {}}}
    run(method, leaves)
    assert [site.path for _, site, _, _ in seen] == ["blocks_0/proj", "blocks_1/proj"]
    own, site, args, ctx = seen[0]
    np.testing.assert_array_equal(own["own"], 1.0)
    np.testing.assert_array_equal(args[0], X)
    assert (site.layer, site.kind, site.args[0].shape) == (0, "Dense", X.shape)
    assert not ctx.train
    assert ctx.key is None
    assert ctx.mask is None
    assert ctx.params["kernel"] is PARAMS["blocks_0"]["proj"]["kernel"]
    assert seen[1][0] == {}
    np.testing.assert_array_equal(seen[1][3].shared["s"], np.arange(3.0))
    assert seen[1][3].params["kernel"] is PARAMS["blocks_1"]["proj"]["kernel"]


def test_context_of_a_training_pass(key):
    seen = []
    method = shifted()._replace(wrap=lambda leaves, site, call, args, ctx: seen.append(ctx) or call(*args))
    mask = jnp.array([1, 2, 0])
    run(method, leaves_of(method), mask=mask, rngs={"dropout": key}, train=True)
    run(method, leaves_of(method), rngs={"other": key})
    first, second, without, _ = seen
    assert first.train
    assert second.train
    assert bool((jax.random.key_data(first.key) == jax.random.key_data(key)).all())
    assert bool((jax.random.key_data(second.key) == jax.random.key_data(key)).all())
    np.testing.assert_array_equal(first.mask, mask)
    assert first.shared == {}
    assert not without.train
    assert without.key is None


def test_a_key_for_each_site(key):
    keys = [site_key(key, "a/b"), site_key(key, "a/c"), site_key(jax.random.key(1), "a/b")]
    drawn = [float(jax.random.uniform(k)) for k in keys]
    assert len(set(drawn)) == 3
    assert float(jax.random.uniform(site_key(key, "a/b"))) == drawn[0]


def test_shared_leaves_get_the_gradient_of_all_their_sites():
    def init(key, sites, params):
        return {SHARED: {"s": jnp.zeros((1, D))}, **{site.path: {} for site in find(sites, "proj")}}

    method = Transform("same", init, lambda leaves, site, call, args, ctx: call(*args) + ctx.shared["s"])
    leaves = leaves_of(method)
    shift = np.asarray(leaves["same_0"][SHARED]["s"], np.float64)
    wanted = by_hand(PARAMS, X, lambda path, x, y: y + shift)
    np.testing.assert_allclose(jax.jit(lambda leaves: run(method, leaves))(leaves), wanted, rtol=1e-4, atol=1e-5)
    grad = jax.grad(lambda leaves: run(method, leaves).sum())(leaves)["same_0"][SHARED]["s"]
    moved = [by_hand(PARAMS, X, lambda path, x, y, s=s: y + shift + s).sum() for s in (1e-6, -1e-6)]
    assert float(grad.sum()) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-3)


def test_a_model_applied_inside_a_wrap_is_left_alone():
    other = randomise(PARAMS, 11)
    inside = Net()  # its own paths are those of the sites

    def wrap(leaves, site, call, args, ctx):
        return call(*args) * leaves["v"] + inside.apply({"params": other}, args[0])[:, :1]

    method = scaled()._replace(wrap=wrap)
    leaves = leaves_of(method)

    def at_proj(path, x, y):
        return y * np.asarray(leaves["scaled_0"][path]["v"]) + by_hand(other, x, lambda path, x, y: y)[:, :1]

    wanted = by_hand(PARAMS, X, at_proj)
    np.testing.assert_allclose(run(method, leaves), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda p: run(method, p))(leaves), wanted, rtol=1e-4, atol=1e-5)


def test_a_wrap_may_change_the_arguments_and_need_not_call():
    changed = scaled(layers=[0])._replace(wrap=lambda leaves, site, call, args, ctx: call(args[0] * leaves["v"]))
    replaced = shifted(layers=[1])._replace(wrap=lambda leaves, site, call, args, ctx: args[0] + leaves["v"])
    method = jpeft.chain(changed, replaced)
    leaves = leaves_of(method)
    first, second = (
        np.asarray(leaves[name][path]["v"], np.float64)
        for name, path in (("scaled_0", "blocks_0/proj"), ("shifted_0", "blocks_1/proj"))
    )
    h = np.tanh(dense(PARAMS["blocks_0"]["proj"], np.asarray(X) * first))
    wanted = dense(PARAMS["out"], np.tanh(h + second))
    np.testing.assert_allclose(run(method, leaves), wanted, rtol=1e-4, atol=1e-5)
