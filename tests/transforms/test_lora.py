import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import rates, split
from jpeft.core.site import Site
from jpeft.core.transform import Context
from jpeft.models import Bert, BertConfig
from jpeft.transforms.dora import dora
from jpeft.transforms.lora import rslora
from jpeft.transforms.pissa import pissa

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 8, "initializer_range": 0.3,
}  # fmt: skip
MODEL = Bert(BertConfig(**SHAPE))
IDS = jax.random.randint(jax.random.key(5), (3, 6), 1, 20)
SITES = jpeft.sites(MODEL, IDS)


PARAMS = randomised(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), IDS)["params"]), 1)


def run(method, leaves, params=PARAMS, model=MODEL, jit=True, **options):
    def forward(params, leaves):
        return jpeft.apply(model, method, {"params": params, "peft": leaves}, IDS, **options)[0]

    return (jax.jit(forward) if jit else forward)(params, leaves)


def base(params=PARAMS, jit=True):
    def forward(params):
        return MODEL.apply({"params": params}, IDS)[0]

    return (jax.jit(forward) if jit else forward)(params)


# Behind "attention/output" the XLA of jax 0.12 fuses the sum with what follows, which can change the last bit.
@pytest.mark.parametrize(
    ("jit", "targets"), [(False, "query|value|intermediate|output"), (True, "query|key|value|intermediate|ffn/output")]
)
@pytest.mark.usefixtures("optimised")
def test_a_fresh_one_leaves_the_logits_bit_identical(jit, targets):
    method = jpeft.lora(4, targets=targets)
    leaves = jpeft.init(method, jax.random.key(1), SITES)
    np.testing.assert_array_equal(run(method, leaves, jit=jit), base(jit=jit))


def test_equals_the_materialised_weight_and_the_merged_one():
    method = jpeft.lora(3, 12.0, targets="query|value|intermediate|ffn/output|pooler")
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    assert len(leaves["lora_0"]) == 2 * 4 + 1
    flat = tree.flatten(PARAMS)
    for path, own in leaves["lora_0"].items():
        at = (*path.split("/"), "kernel")
        a, b = (np.asarray(own[name], np.float64) for name in "ab")
        flat[at] = jnp.asarray(np.asarray(flat[at], np.float64) + 12.0 / 3 * a @ b, jnp.float32)
    wanted = base(tree.unflatten(flat))
    now = run(method, leaves)
    assert np.abs(now - base()).max() > 0.05
    np.testing.assert_allclose(now, wanted, atol=1e-5)
    merged = jpeft.merge(method, leaves, PARAMS)
    assert merged.transform.members == ()
    assert merged.leaves == {}
    for path, x in tree.flatten(merged.params).items():
        np.testing.assert_allclose(x, flat[path], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(base(merged.params), now, atol=1e-5)


def test_the_layers_that_it_is_in():
    leaves = jpeft.init(jpeft.lora(2, targets="query", layers=[1]), jax.random.key(1), SITES)
    assert list(leaves["lora_0"]) == ["encoder/layer_1/attention/query"]


def test_shapes_and_initial_values():
    leaves = jpeft.init(jpeft.lora(20, targets="intermediate|ffn/output"), jax.random.key(1), SITES)["lora_0"]
    for end, n_in, n_out in (("intermediate", 16, 24), ("output", 24, 16)):
        own = leaves[f"encoder/layer_1/ffn/{end}"]
        assert own["a"].shape == (n_in, 20)
        assert own["b"].shape == (20, n_out)
        assert not own["b"].any()
        bound = n_in**-0.5
        assert 0.95 * bound < float(jnp.abs(own["a"]).max()) <= bound
        assert float(own["a"].std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert own["a"].dtype == own["b"].dtype == jnp.float32
    first, second = (leaves[f"encoder/layer_{i}/ffn/intermediate"]["a"] for i in (0, 1))
    assert float(jnp.abs(first - second).max()) > 0.1


def site_call(method, leaves, x, kernel, key=None):
    site = Site("somewhere/query", None, "Dense", {}, ())
    ctx = Context(key is not None, key, None, {}, {})
    return method.wrap(leaves, site, lambda x: x @ kernel, (x,), ctx)


def test_dropout_falls_on_what_goes_into_a_and_nowhere_else():
    x = jnp.full((50, 40), 2.0)
    leaves = {"a": jnp.eye(40), "b": jnp.eye(40)}  # rank 40, so the output shows the entries of x
    method = jpeft.lora(40, 40.0, dropout=0.25)
    kernel = jnp.zeros((40, 40)).at[0, 0].set(1.0)
    added = site_call(method, leaves, x, kernel, jax.random.key(0)) - x @ kernel
    assert set(np.unique(np.round(added, 4))) == {np.float32(0.0), np.float32(2.6667)}
    assert float((added == 0).mean()) == pytest.approx(0.25, abs=0.04)
    np.testing.assert_allclose(site_call(method, leaves, x, kernel) - x @ kernel, x, rtol=1e-6)  # not in training


def test_dropout_is_reproducible_by_key():
    config = BertConfig(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    method, never = jpeft.lora(2, dropout=0.5), jpeft.lora(2)
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)

    def train(method, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return run(method, leaves, model=Bert(config), rngs=rngs, train=True)

    np.testing.assert_array_equal(train(method, 0), train(method, 0))
    assert np.abs(train(method, 0) - train(method, 1)).max() > 1e-3
    np.testing.assert_allclose(run(method, leaves), run(never, leaves), atol=1e-6)
    np.testing.assert_allclose(train(never, 0), run(never, leaves), atol=1e-6)


def test_dropout_differs_by_site(key):
    method = jpeft.lora(40, 40.0, dropout=0.5)
    leaves = {"a": jnp.eye(40), "b": jnp.eye(40)}
    ctx = Context(True, key, None, {}, {})
    first, second = (
        method.wrap(leaves, Site(path, None, "Dense", {}, ()), jnp.zeros_like, (jnp.ones((8, 40)),), ctx)
        for path in ("a", "b")
    )
    assert float((first != second).mean()) > 0.3


def test_bfloat16():
    model = Bert(BertConfig(**SHAPE, dtype="bfloat16"))
    method = jpeft.lora(2)
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    now = run(method, leaves, model=model)
    assert now.dtype == jnp.float32
    assert 0 < np.abs(now - run(method, leaves)).max() < 0.1
    grads = jax.grad(lambda leaves: run(method, leaves, model=model).sum())(leaves)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    x = jnp.ones((2, 4), jnp.bfloat16)
    own = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}
    assert site_call(method, own, x, jnp.ones((4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"rank": -2}, "rank must be positive"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        jpeft.lora(**options)


@pytest.mark.parametrize("target", ["LayerNorm", "ffn", "core"])
def test_a_target_that_is_no_dense_layer(target):
    with pytest.raises(UserError, match=rf"{target}' \(\w+, .* is not one of the Dense layers: .* are 'enc"):
        jpeft.init(jpeft.lora(targets=target), jax.random.key(0), SITES)


def test_a_target_that_is_not_there():
    with pytest.raises(UserError, match="did you mean 'query'"):
        jpeft.init(jpeft.lora(targets="qeury"), jax.random.key(0), SITES)


def test_rslora_divides_by_the_root_of_the_rank():
    method = rslora(9, 12.0)
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    kernel = np.asarray(jax.random.normal(jax.random.key(3), (16, 16)), np.float64)
    x = jax.random.normal(jax.random.key(4), (2, 5, 16))
    own = leaves["rslora_0"]["encoder/layer_1/attention/value"]
    a, b = (np.asarray(own[name], np.float64) for name in "ab")
    wanted = np.asarray(x, np.float64) @ (kernel + 4.0 * a @ b)
    np.testing.assert_allclose(site_call(method, own, x, jnp.float32(kernel)), wanted, atol=1e-5)
    merged = jpeft.merge(method, leaves, PARAMS)
    np.testing.assert_allclose(base(merged.params), run(method, leaves), atol=1e-5)


def test_ranks_and_alphas_by_pattern_the_first_match_counts():
    method = jpeft.lora(
        4, 8.0, rank_pattern={"layer_0/.*": 2, "query": 3}, alpha_pattern={"layer_1/attention/query": 6.0}
    )
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    flat = tree.flatten(PARAMS)
    for layer, name, rank, scale in ((0, "query", 2, 4), (0, "value", 2, 4), (1, "query", 3, 2), (1, "value", 4, 2)):
        path = f"encoder/layer_{layer}/attention/{name}"
        own = leaves["lora_0"][path]
        assert own["a"].shape == (16, rank)
        assert own["b"].shape == (rank, 16)
        at = (*path.split("/"), "kernel")
        flat[at] = flat[at] + scale * own["a"] @ own["b"]
    np.testing.assert_allclose(run(method, leaves), base(tree.unflatten(flat)), atol=1e-5)
    merged = jpeft.merge(method, leaves, PARAMS)
    np.testing.assert_allclose(base(merged.params), run(method, leaves), atol=1e-5)


@pytest.mark.parametrize("make", [jpeft.lora, rslora, dora, pissa])
def test_lora_plus_is_a_rate_for_b_alone(make):
    method = make(2, learning_rate_ratio=16.0)
    rate = rates(method)
    trained, _ = split(jpeft.init(method, jax.random.key(0), SITES, PARAMS))
    found = {path[-1]: rate(path) for path in tree.flatten(trained)}
    assert found.pop("b") == 16.0
    assert set(found.values()) == {1.0}
    assert make(2).rate is None


def gated_by_loop(x, y, own, mask):
    """y + gate(x) (x A) B, row by row and token by token, in NumPy's float64."""
    a, b, w, c = (np.asarray(z, np.float64) for z in (own["a"], own["b"], own["gate"]["kernel"], own["gate"]["bias"]))
    out = np.array(y, np.float64)
    for row in range(len(x)):
        real = [t for t in range(x.shape[1]) if t < x.shape[1] - mask.shape[1] or mask[row, t - x.shape[1]] > 0]
        gate = np.mean([1 / (1 + np.exp(-(x[row, t] @ w + c))) for t in real])
        out[row] += gate * (x[row] @ a @ b)
    return out


@pytest.mark.parametrize("prompts", [0, 2])
def test_a_gate_takes_the_place_of_the_scale(prompts):
    method = jpeft.lora(3, 99.0, gate=True)
    assert method.merge is None
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2, scale=0.5)
    own = leaves["lora_0"]["encoder/layer_0/attention/query"]
    assert jax.tree.map(jnp.shape, own) == {"a": (16, 3), "b": (3, 16), "gate": {"kernel": (16, 1), "bias": (1,)}}
    x = jax.random.normal(jax.random.key(4), (3, 5 + prompts, 16))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 0, 0], [1, 0, 0, 0, 0]])
    site = Site("layer_0/query", 0, "Dense", {}, ())
    now = method.wrap(own, site, lambda x: 2 * x, (x,), Context(False, None, mask, {}, {}))
    np.testing.assert_allclose(now, gated_by_loop(x, 2 * x, own, mask), atol=1e-5)
    everything = method.wrap(own, site, lambda x: 2 * x, (x,), Context(False, None, None, {}, {}))
    np.testing.assert_allclose(everything, gated_by_loop(x, 2 * x, own, np.ones((3, 5))), atol=1e-5)
    assert np.abs(everything - now).max() > 1e-3


def test_a_fresh_gated_one_leaves_the_logits_bit_identical():
    method = jpeft.lora(2, gate=True)
    leaves = jpeft.init(method, jax.random.key(1), SITES)
    np.testing.assert_array_equal(run(method, leaves), base())
    plain = jpeft.init(jpeft.lora(2), jax.random.key(1), SITES)["lora_0"]
    for path, own in leaves["lora_0"].items():
        np.testing.assert_array_equal(own["a"], plain[path]["a"])


def test_padding_does_not_move_a_gated_one():
    method = jpeft.lora(2, gate=True)
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    mask = jnp.ones_like(IDS).at[:, 4:].set(0)

    def logits(ids, mask):
        return jpeft.apply(MODEL, method, {"params": PARAMS, "peft": leaves}, ids, mask, mask=mask)[0]

    np.testing.assert_allclose(logits(IDS, mask), logits(IDS[:, :4], mask[:, :4]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be positive, got 0"),
        ({"rank_pattern": {"query": 2.5}}, r"rank_pattern\['query'\] must be an integer"),
        ({"alpha_pattern": {"query": -1.0}}, r"alpha_pattern\['query'\] must be positive"),
        ({"learning_rate_ratio": 0.0}, "learning_rate_ratio must be positive"),
    ],
)
@pytest.mark.parametrize("make", [jpeft.lora, rslora, dora, pissa])
def test_the_familys_options_out_of_range(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("make", [jpeft.lora, rslora, dora, pissa])
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target(make, name):
    method = make(**{name: {"query": 2, "layer_0/attention/value": 3}}, layers=[1])
    with pytest.raises(UserError, match=f"{name} 'layer_0/attention/value' matches none of the targets: did you mean"):
        jpeft.init(method, jax.random.key(0), SITES, PARAMS)
    with pytest.raises(UserError, match="not a regular expression"):
        jpeft.init(make(**{name: {"(": 2}}), jax.random.key(0), SITES, PARAMS)


def test_a_gate_has_no_alpha_and_needs_a_sequence():
    with pytest.raises(UserError, match="a gated LoRA has no alpha"):
        jpeft.lora(gate=True, alpha_pattern={"query": 2.0})
    with pytest.raises(UserError, match="a gate needs"):
        jpeft.init(jpeft.lora(gate=True, targets="pooler"), jax.random.key(0), SITES)
