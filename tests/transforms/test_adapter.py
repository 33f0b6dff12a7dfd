import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.site import Site
from jpeft.core.transform import Context
from jpeft.models import Bert, BertConfig

SHAPE = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
    "max_position_embeddings": 8, "initializer_range": 0.3,
}  # fmt: skip
MODEL = Bert(BertConfig(**SHAPE))
IDS = jax.random.randint(jax.random.key(5), (3, 6), 1, 20)
SITES = jpeft.sites(MODEL, IDS)
D = 32
KINDS = {"houlsby": jpeft.houlsby, "pfeiffer": jpeft.pfeiffer, "parallel": jpeft.parallel}


PARAMS = randomised(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), IDS)["params"]), 1)


def run(method, leaves, model=MODEL, jit=True):
    def forward(leaves):
        return jpeft.apply(model, method, {"params": PARAMS, "peft": leaves}, IDS)[0]

    return (jax.jit(forward) if jit else forward)(leaves)


@functools.cache
def base():
    return jax.jit(lambda: MODEL.apply({"params": PARAMS}, IDS)[0])()


ERF = np.vectorize(math.erf)
ACTIVATION = {
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / np.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def bottleneck(leaves, x, activation):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), leaves)
    inner = ACTIVATION[activation](x @ p["down"]["kernel"] + p["down"]["bias"][None, None])
    return inner @ p["up"]["kernel"] + p["up"]["bias"][None, None]


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def jnorm(x, residual):
    x = x + residual
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def at_site(method, leaves, call, *args):
    ctx = Context(False, None, None, {}, {})
    return method.wrap(leaves, Site("x", None, "Toy", {}, ()), call, tuple(map(jnp.asarray, args)), ctx)


def draw():
    rng = np.random.default_rng(3)
    hidden, residual = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 3, 6))
    zeros = {"down": {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)},
             "up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}}  # fmt: skip
    return hidden.astype(np.float32), residual.astype(np.float32), randomised(zeros, 4, 0.7)


@pytest.mark.parametrize("activation", ACTIVATION)
def test_houlsby_at_its_site(activation):
    hidden, residual, leaves = draw()
    now = at_site(jpeft.houlsby(activation=activation), leaves, jnorm, hidden, residual)
    wanted = norm(hidden + bottleneck(leaves, hidden, activation) + residual)
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_pfeiffer_at_its_site(activation):
    """Reads the normalised output, adds to the raw one, and is normalised again."""
    hidden, residual, leaves = draw()
    now = at_site(jpeft.pfeiffer(activation=activation), leaves, jnorm, hidden, residual)
    wanted = norm(hidden + bottleneck(leaves, norm(hidden + residual), activation) + residual)
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [4.0, 0.5])
def test_parallel_at_its_site(scale):
    x, _, leaves = draw()
    now = at_site(jpeft.parallel(scale=scale), leaves, lambda x: jnp.sin(x) + 1, x)
    wanted = np.sin(x) + 1 + scale * bottleneck(leaves, x, "relu")
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "activation"), [(jpeft.houlsby, "swish"), (jpeft.pfeiffer, "relu"), (jpeft.parallel, "relu")]
)
def test_default_activations(make, activation):
    hidden, residual, leaves = draw()
    args = (jnorm, hidden, residual) if make is not jpeft.parallel else (jnp.sin, hidden)
    default, named = (at_site(m, leaves, *args) for m in (make(), make(activation=activation)))
    np.testing.assert_array_equal(default, named)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_leaves_change_nothing_and_random_ones_do(kind):
    method = KINDS[kind](4)
    leaves = jpeft.init(method, jax.random.key(1), SITES)
    np.testing.assert_allclose(run(method, jax.tree.map(jnp.zeros_like, leaves)), base(), atol=1e-6)
    assert np.abs(run(method, randomised(leaves, 2)) - base()).max() > 0.01


def test_a_fresh_parallel_one_leaves_the_logits():
    method = jpeft.parallel()
    leaves = jpeft.init(method, jax.random.key(1), SITES)
    np.testing.assert_allclose(run(method, leaves), base(), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "ends", "width"),
    [
        ("houlsby", ["attention_add_norm", "ffn_add_norm"], 2),
        ("pfeiffer", ["ffn_add_norm"], 2),
        ("parallel", ["ffn"], 16),
    ],
)
def test_places_and_shapes(kind, ends, width):
    leaves = jpeft.init(KINDS[kind](), jax.random.key(1), SITES)[f"{kind}_0"]
    assert set(leaves) == {f"encoder/layer_{i}/{end}" for i in (0, 1) for end in ends}
    for own in leaves.values():
        assert jax.tree.map(jnp.shape, own) == {
            "down": {"kernel": (D, width), "bias": (width,)},
            "up": {"kernel": (width, D), "bias": (D,)},
        }
    one = jpeft.init(KINDS[kind](5, layers=[1]), jax.random.key(1), SITES)[f"{kind}_0"]
    assert set(one) == {f"encoder/layer_1/{end}" for end in ends}
    assert all(own["up"]["kernel"].shape == (5, D) for own in one.values())


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind):
    leaves = jpeft.init(KINDS[kind](64, layers=[0]), jax.random.key(1), SITES)[f"{kind}_0"]
    for own in leaves.values():
        down, up = own["down"]["kernel"], own["up"]["kernel"]
        assert not own["down"]["bias"].any()
        assert not own["up"]["bias"].any()
        if kind == "parallel":
            assert not up.any()
            assert 0.95 * D**-0.5 < float(jnp.abs(down).max()) <= D**-0.5
            assert float(down.std()) == pytest.approx(D**-0.5 / 3**0.5, rel=0.05)
        else:
            assert float(down.std()) == pytest.approx(0.02, rel=0.08)
            assert float(up.std()) == pytest.approx(0.02, rel=0.08)
            assert abs(float(jnp.corrcoef(down.ravel(), up.ravel())[0, 1])) < 0.1  # two draws, not one


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    model = Bert(BertConfig(**SHAPE, dtype="bfloat16"))
    method = KINDS[kind](4)
    leaves = randomised(jpeft.init(method, jax.random.key(1), SITES), 2)
    assert 0 < np.abs(run(method, leaves, model) - run(method, leaves)).max() < 0.15
    x = jnp.ones((1, 2, 6), jnp.bfloat16)
    _, _, own = draw()
    args = (x,) if kind == "parallel" else (x, x)
    assert at_site(method, own, lambda *args: args[0], *args).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind):
    make = KINDS[kind]
    with pytest.raises(UserError, match="bottleneck must be positive, got 0"):
        make(0)
    with pytest.raises(UserError, match="reduction_factor must be positive"):
        make(reduction_factor=0)
    with pytest.raises(UserError, match="activation 'rleu' is unknown: did you mean 'relu'"):
        make(activation="rleu")
    with pytest.raises(UserError, match="reduction_factor 64 leaves no bottleneck at hidden size 32"):
        jpeft.init(make(reduction_factor=64), jax.random.key(0), SITES)
    with pytest.raises(UserError, match="matches no site"):
        jpeft.init(make(targets="fnn"), jax.random.key(0), SITES)
    with pytest.raises(UserError, match="layer 7 has no site"):
        jpeft.init(make(layers=[7]), jax.random.key(0), SITES)


def test_the_scale_of_a_parallel_one():
    with pytest.raises(UserError, match="scale must be positive"):
        jpeft.parallel(scale=0)


def layer_norm(p, x):
    p = {name: np.asarray(v, np.float64) for name, v in p.items()}
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * p["scale"] + p["bias"]


OPTIONS = {
    "scale": {"scale": 0.5},
    "learned": {"learned_scale": True},
    "gate": {"gate": True},
    "ln_before": {"ln_before": True},
    "ln_after": {"ln_after": True},
    "all": {"learned_scale": True, "gate": True, "ln_before": True, "ln_after": True},
}


def addition(leaves, x, activation, mask, scale=1.0, learned_scale=False, gate=False, ln_before=False, ln_after=False):
    """What an adapter adds, row by row."""
    rows = []
    for row, real in zip(np.asarray(x, np.float64), mask > 0, strict=True):
        inner = layer_norm(leaves["ln_before"], row) if ln_before else row
        out = bottleneck(leaves, inner[None], activation)[0] * (float(leaves["scale"][0]) if learned_scale else scale)
        if gate:
            w, b = (np.asarray(leaves["gate"][name], np.float64) for name in ("kernel", "bias"))
            out = out * np.mean([1 / (1 + np.exp(-(token @ w + b))) for token in row[real]])
        rows.append(layer_norm(leaves["ln_after"], out) if ln_after else out)
    return np.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind, options):
    """What is scaled, gated and normalised, and what the gate reads: the adapter's input, before its own LayerNorm."""
    hidden, residual, _ = draw()
    method = KINDS[kind](4, activation="tanh", **options)
    x = jax.ShapeDtypeStruct(hidden.shape, hidden.dtype)
    at = {
        f"layer_0/{end}": Site(f"layer_0/{end}", 0, "Toy", {}, args, x)
        for end, args in (("ffn", (x,)), ("ffn_add_norm", (x, x)))
    }
    targets = KINDS[kind](4, targets="ffn" if kind == "parallel" else "ffn_add_norm", activation="tanh", **options)
    leaves = next(iter(targets.init(jax.random.key(0), at, None).values()))
    leaves = randomised(leaves, 3, 0.8)
    mask = np.array([[1, 1, 0], [1, 2, 2]])
    ctx = Context(False, None, jnp.asarray(mask), {}, {})
    site = Site("x", None, "Toy", {}, ())
    scale = {"scale": 4.0} if kind == "parallel" else {}
    if kind == "parallel":
        now = method.wrap(leaves, site, jnp.sin, (jnp.asarray(hidden),), ctx)
        wanted = np.sin(hidden) + addition(leaves, hidden, "tanh", mask, **(scale | options))
    else:
        now = method.wrap(leaves, site, jnorm, (jnp.asarray(hidden), jnp.asarray(residual)), ctx)
        reads = hidden if kind == "houlsby" else norm(hidden + residual)
        wanted = norm(hidden + addition(leaves, reads, "tanh", mask, **options) + residual)
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_leaves_that_options_add(kind):
    method = KINDS[kind](4, scale=3.0, learned_scale=True, gate=True, ln_before=True, ln_after=True)
    for own in jpeft.init(method, jax.random.key(1), SITES)[f"{kind}_0"].values():
        assert set(own) == {"down", "up", "scale", "gate", "ln_before", "ln_after"}
        np.testing.assert_array_equal(own["scale"], [3.0])
        assert own["gate"]["kernel"].shape == (D, 1)
        for name in ("ln_before", "ln_after"):
            np.testing.assert_array_equal(own[name]["scale"], np.ones(D))
            np.testing.assert_array_equal(own[name]["bias"], np.zeros(D))


def test_a_learned_scale_starts_where_the_constant_one_is():
    same = jpeft.parallel(4), jpeft.parallel(4, learned_scale=True)
    leaves = [jpeft.init(method, jax.random.key(1), SITES) for method in same]
    drawn = randomised(leaves[0], 2)
    learned = {
        "parallel_0": {path: {**leaves[1]["parallel_0"][path], **own} for path, own in drawn["parallel_0"].items()}
    }
    np.testing.assert_allclose(run(same[1], learned), run(same[0], drawn), atol=1e-5)


def test_a_fresh_gated_parallel_one_leaves_the_logits():
    method = jpeft.parallel(gate=True, ln_before=True, learned_scale=True)
    np.testing.assert_allclose(run(method, jpeft.init(method, jax.random.key(1), SITES)), base(), atol=1e-6)


def test_a_gate_needs_a_sequence():
    with pytest.raises(UserError, match="a gate needs"):
        jpeft.init(jpeft.parallel(4, targets="pooler", gate=True), jax.random.key(0), SITES)
    with pytest.raises(UserError, match="scale must be positive"):
        jpeft.houlsby(scale=-1.0)
