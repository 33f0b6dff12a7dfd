"""The hook, with toy transforms whose composition can be written by hand, on linen models that never heard of jpeft."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import tree
from jpeft.errors import UserError
from jpeft.models import Bert, BertConfig
from jpeft.site import find, layer_of
from jpeft.transform import SHARED, Transform, init_sites, site_key

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
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, made)


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
PARAMS = randomise(NET.init(jax.random.key(0), X)["params"], 1)
SITES = jpeft.sites(NET, X)
BLOCKS = {"plain": Block, "jit": JitBlock, "remat": RematBlock}


def leaves_of(transform, seed=2):
    return randomise(jpeft.init(transform, jax.random.key(0), SITES, PARAMS), seed)


def run(transform, leaves, model=NET, params=PARAMS, **options):
    return jpeft.apply(model, transform, {"params": params, "peft": leaves}, X, **options)


# Sites.


def test_sites_of_a_users_model():
    paths = ["blocks_0", "blocks_0/proj", "blocks_1", "blocks_1/proj", "Dropout_0", "out"]
    assert sorted(SITES) == sorted(paths)
    assert [site.path for site in SITES.values()] == list(SITES) == paths
    proj = SITES["blocks_1/proj"]
    assert (proj.layer, proj.kind) == (1, "Dense")
    assert proj.params["kernel"].shape == (D, D)
    assert proj.args[0] == jax.ShapeDtypeStruct((4, D), jnp.float32)
    assert SITES["out"].layer is None
    assert SITES["out"].params["kernel"].shape == (D, 3)
    assert jpeft.layers(SITES) == (0, 1)


def test_sites_of_an_encoder():
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=8,
    )  # fmt: skip
    found = jpeft.sites(Bert(config), jax.ShapeDtypeStruct((3, 6), jnp.int32))
    per_layer = ["", "/attention", "/ffn", "/attention_add_norm", "/ffn_add_norm", "/attention/core", "/ffn/output"]
    per_layer += [f"/attention/{name}" for name in ("query", "key", "value", "output")] + ["/ffn/intermediate"]
    per_layer += ["/attention_add_norm/LayerNorm", "/ffn_add_norm/LayerNorm"]
    wanted = {f"encoder/layer_{i}{end}" for i in (0, 1) for end in per_layer}
    wanted |= {"embeddings", "embeddings/inputs", "embeddings/LayerNorm", "encoder", "pooler", "classifier"}
    wanted |= {f"embeddings/{name}_embeddings" for name in ("word", "position", "token_type")}
    assert {path for path in found if "Dropout" not in path} == wanted
    core = found["encoder/layer_1/attention/core"]
    assert core.layer == 1
    assert core.params == {}
    assert [x.shape for x in core.args] == [(3, 6, 16), *[(3, 4, 6, 4)] * 3, (3, 1, 6, 6)]
    assert found["encoder/layer_0/ffn/intermediate"].params["kernel"].shape == (16, 24)


def test_sites_computes_and_allocates_nothing():
    model = nn.Sequential([nn.Dense(10**7), nn.Dense(10**7)])  # 400 TB
    found = jpeft.sites(model, jax.ShapeDtypeStruct((1, 10**7), jnp.float32))
    assert found["layers_1"].params["kernel"].shape == (10**7, 10**7)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(next(tuple(s) for s in found.values())[3:]))


def test_sites_takes_flags_and_lists_a_module_called_twice_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, flag, *, train):
            assert flag is True
            assert train is False
            proj = nn.Dense(D, name="proj")
            return proj(proj(x)[:2])

    found = jpeft.sites(Twice(), X, True, train=False)
    assert list(found) == ["proj"]
    assert found["proj"].args[0].shape == (4, D)


@pytest.mark.parametrize(
    ("path", "layer"),
    [("encoder/layer_11/attention", 11), ("h_3", 3), ("a/blocks_2/b", 2), ("layers_0", 0), ("block_4/x", 4),
     ("pooler", None), ("xlayer_3", None), ("layer_3x", None), ("Dense_1", None)],
)  # fmt: skip
def test_layer_of(path, layer):
    assert layer_of(path) == layer


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "layers", "paths"),
    [
        ("proj", None, ["blocks_0/proj", "blocks_1/proj"]),
        ("proj", [1], ["blocks_1/proj"]),
        ("out|proj", None, ["blocks_0/proj", "blocks_1/proj", "out"]),
        ("blocks_0/proj", None, ["blocks_0/proj"]),
        ("blocks_[01]/proj", (1, 0), ["blocks_0/proj", "blocks_1/proj"]),
        ("blocks_.", None, ["blocks_0", "blocks_1"]),
    ],
)
def test_find(pattern, layers, paths):
    assert [site.path for site in find(SITES, pattern, layers)] == paths


@pytest.mark.parametrize("pattern", ["pro", "roj", "blocks", "", "proj/"])
def test_find_takes_whole_parts_only(pattern):
    with pytest.raises(UserError, match="matches no site"):
        find(SITES, pattern)


def test_find_names_the_nearest():
    with pytest.raises(UserError, match=r"'prj' matches no site of the model: did you mean 'proj'"):
        find(SITES, "prj")
    with pytest.raises(UserError, match=r"matches no site of the model: did you mean 'proj'"):
        find(SITES, "blocks_0/projj")


def test_find_where_a_layer_is_missing():
    with pytest.raises(UserError, match=r"layer 2 has no site that matches 'proj': layers 0 to 1 have"):
        find(SITES, "proj", [0, 2])
    with pytest.raises(UserError, match=r"layer 0 has no site that matches 'out': its matches are in no layer"):
        find(SITES, "out", [0])


def test_find_with_a_bad_regular_expression():
    with pytest.raises(UserError, match=r"'\(proj' is not a regular expression"):
        find(SITES, "(proj")


# Chains and init.


def test_instances_count_each_method():
    method = jpeft.chain(scaled(), jpeft.chain(shifted(), scaled()), jpeft.chain())
    assert list(jpeft.instances(method)) == ["scaled_0", "shifted_0", "scaled_1"]
    assert [t.name for t in method.members] == ["scaled", "shifted", "scaled"]
    assert list(jpeft.instances(scaled())) == ["scaled_0"]


@pytest.mark.parametrize("jit", [False, True])
def test_the_later_one_wraps_the_earlier_one(jit):
    # Names that sort the other way round: a traced dict comes back sorted.
    for method, wanted in (
        (jpeft.chain(scaled(), shifted()), lambda y, scale, shift: y * scale + shift),
        (jpeft.chain(shifted(), scaled()), lambda y, scale, shift: (y + shift) * scale),
    ):
        leaves = leaves_of(method)
        fn = jax.jit(run, static_argnums=0) if jit else run

        def at_proj(path, x, y, leaves=leaves, wanted=wanted):
            return wanted(y, np.asarray(leaves["scaled_0"][path]["v"]), np.asarray(leaves["shifted_0"][path]["v"]))

        np.testing.assert_allclose(fn(method, leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)


def test_a_method_twice_in_a_chain():
    method = jpeft.chain(scaled(), shifted(), scaled(layers=[1]))
    leaves = leaves_of(method)

    def at_proj(path, x, y):
        v = {name: np.asarray(own[path]["v"]) for name, own in leaves.items() if path in own}
        return (y * v["scaled_0"] + v["shifted_0"]) * v.get("scaled_1", 1.0)

    np.testing.assert_allclose(run(method, leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)


def test_init_depends_on_nothing_else_in_the_chain_and_on_no_other_layer(key):
    alone = jpeft.init(scaled(), key, SITES)
    chained = jpeft.init(jpeft.chain(shifted(), scaled()), key, SITES)
    chex.assert_trees_all_equal(alone["scaled_0"], chained["scaled_0"])
    one = jpeft.init(scaled(layers=[1]), key, SITES)
    assert list(one["scaled_0"]) == ["blocks_1/proj"]
    np.testing.assert_array_equal(one["scaled_0"]["blocks_1/proj"]["v"], alone["scaled_0"]["blocks_1/proj"]["v"])


def test_init_differs_by_site_instance_and_key(key):
    leaves = jpeft.init(jpeft.chain(scaled(), scaled(), shifted()), key, SITES)
    other = jpeft.init(scaled(), jax.random.key(1), SITES)
    drawn = [tuple(map(float, x[0])) for x in jax.tree.leaves((leaves, other))]
    assert len(set(drawn)) == len(drawn) == 8


def test_init_hands_over_the_parameters(key):
    given = []
    method = Transform("spy", lambda key, sites, params: given.append(params) or {}, None)
    jpeft.init(method, key, SITES, PARAMS)
    jpeft.init(method, key, SITES)
    assert given[0] is PARAMS
    assert given[1] is None


# Apply under every transformation of JAX.


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
    params = randomise(model.init(key, X, factor=1.0)["params"], 3)
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
    with pytest.raises(UserError, match=r"no site 'blocks_2/proj' that the leaves are for: did you mean 'blocks_"):
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


# Merging and folding.


def merge_shift(leaves, params):
    for path, own in leaves.items():
        params = tree.replace(params, f"{path}/bias", lambda b, own=own: b + own["v"][0])
    return params


@pytest.mark.parametrize("jit", [False, True])
def test_without_a_wrap_the_leaves_are_merged_in_the_forward_pass(jit):
    method = jpeft.chain(shifted(merge=merge_shift)._replace(wrap=None), scaled())
    leaves = leaves_of(method)
    fn = jax.jit(lambda leaves: run(method, leaves)) if jit else lambda leaves: run(method, leaves)

    def at_proj(path, x, y):
        return (y + np.asarray(leaves["shifted_0"][path]["v"])) * np.asarray(leaves["scaled_0"][path]["v"])

    np.testing.assert_allclose(fn(leaves), by_hand(PARAMS, X, at_proj), rtol=1e-4, atol=1e-5)
    grads = jax.grad(lambda leaves: (run(method, leaves) ** 2).sum())(leaves)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_merge_leaves_the_base_untouched_and_returns_the_rest():
    """The rest is numbered anew, so its leaves must be too."""
    method = jpeft.chain(shifted(layers=[0], merge=merge_shift), scaled(), shifted(layers=[1]))
    leaves = leaves_of(method)
    before = jax.tree.leaves(PARAMS)
    copies = [np.array(x) for x in before]
    merged = jpeft.merge(method, leaves, PARAMS)
    assert all(x is y for x, y in zip(jax.tree.leaves(PARAMS), before, strict=True))
    assert all(x.tobytes() == np.asarray(y).tobytes() for x, y in zip(copies, before, strict=True))
    assert list(jpeft.instances(merged.transform)) == list(merged.leaves) == ["scaled_0", "shifted_0"]
    assert merged.leaves["shifted_0"] is leaves["shifted_1"]
    assert merged.params["out"]["kernel"] is PARAMS["out"]["kernel"]
    assert merged.params["blocks_0"]["proj"]["bias"] is not PARAMS["blocks_0"]["proj"]["bias"]
    now = run(merged.transform, merged.leaves, params=merged.params)
    np.testing.assert_allclose(now, run(method, leaves), rtol=1e-5, atol=1e-6)


def test_fold():
    method = jpeft.chain(scaled(fold=lambda leaves: {path: {"v": 2 * own["v"]} for path, own in leaves.items()}),
                         shifted())  # fmt: skip
    leaves = leaves_of(method)
    folded = jpeft.fold(method, leaves)
    assert list(folded) == ["scaled_0", "shifted_0"]
    assert folded["shifted_0"] is leaves["shifted_0"]
    for path, own in leaves["scaled_0"].items():
        np.testing.assert_array_equal(folded["scaled_0"][path]["v"], 2 * own["v"])
