import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.site import Site
from jpeft.core.transform import SHARED, Context
from jpeft.models import Bert, BertConfig
from jpeft.models.bert import Core

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 12, "initializer_range": 0.3,
}  # fmt: skip
MODEL = Bert(BertConfig(**SHAPE))
IDS = jax.random.randint(jax.random.key(5), (3, 6), 1, 20)
SITES = jpeft.sites(MODEL, IDS)
CORES = [f"encoder/layer_{i}/attention/core" for i in (0, 1)]
METHODS = {"mlp": jpeft.prefix(3, 8), "flat": jpeft.prefix(3, None)}


def randomise(tree, seed, scale=0.4):
    return randomised(tree, seed, scale)


PARAMS = randomise(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), IDS)["params"]), 1)
LEAVES = {name: randomise(jpeft.init(m, jax.random.key(1), SITES), 2, 0.8) for name, m in METHODS.items()}


def run(method, leaves, *args, model=MODEL):
    return jax.jit(lambda p, *a: jpeft.apply(model, method, {"params": PARAMS, "peft": p}, *a))(leaves, *args)


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def keys_values(own, shared):
    """The prefix of a site by hand."""
    own, shared = f64(own), f64(shared)
    if not shared:
        return own["key"], own["value"]
    h = np.tanh(shared["embedding"] @ shared["mlp"]["kernel"] + shared["mlp"]["bias"][None])
    return tuple(h @ own[name]["kernel"] + own[name]["bias"][None] for name in ("key", "value"))


def attention(query, key, value, mask, pk, pv):
    """Attention over the prefix and what the mask [b, 1, t, t] lets through, one query after the other."""
    b, heads, t, k = query.shape
    out = np.zeros_like(query)
    for row, head, at in np.ndindex(b, heads, t):
        seen = np.flatnonzero(mask[row, 0, at])
        columns = slice(head * k, (head + 1) * k)
        keys = np.concatenate([pk[:, columns], key[row, head][seen]])
        values = np.concatenate([pv[:, columns], value[row, head][seen]])
        weights = np.exp(keys @ query[row, head, at] / np.sqrt(k))
        out[row, head, at] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("kind", METHODS)
def test_equals_attention_by_hand(kind):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(3, 2, 5, 8)).astype(np.float32) for _ in range(3))
    mask = rng.random((3, 1, 5, 5)) < 0.6  # some query may see nothing but the prefix
    mask[0, 0, 0] = False

    def core(*args):
        return Core(0.0).apply({}, *args, train=False)

    leaves = LEAVES[kind]["prefix_0"]
    shared = leaves.get(SHARED, {})
    for path in CORES:
        ctx = Context(False, None, None, {}, shared)
        args = tuple(map(jnp.asarray, (np.zeros((3, 5, 16), np.float32), query, key, value, mask)))
        now = METHODS[kind].wrap(leaves[path], Site(path, 0, "Core", {}, ()), core, args, ctx)
        wanted = attention(*f64((query, key, value)), mask, *keys_values(leaves[path], shared))
        np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_reaches_the_logits_of_the_model(kind):
    """Zero keys and values are not nothing: they draw attention. Both layers count."""
    base = MODEL.apply({"params": PARAMS}, IDS)[0]
    now = run(METHODS[kind], LEAVES[kind], IDS)[0]
    assert np.abs(now - base).max() > 0.01
    for path in CORES:
        silent = {name: jax.tree.map(jnp.zeros_like, x) if name == path else x
                  for name, x in LEAVES[kind]["prefix_0"].items()}  # fmt: skip
        assert np.abs(run(METHODS[kind], {"prefix_0": silent}, IDS)[0] - now).max() > 1e-3


def test_fold_equals_unfolded_and_drops_the_mlp():
    method, leaves = METHODS["mlp"], LEAVES["mlp"]
    folded = jpeft.fold(method, leaves)
    assert set(folded["prefix_0"]) == set(CORES)
    for path in CORES:
        assert jax.tree.map(jnp.shape, folded["prefix_0"][path]) == {"key": (3, 16), "value": (3, 16)}
        pk, pv = keys_values(leaves["prefix_0"][path], leaves["prefix_0"][SHARED])
        np.testing.assert_allclose(folded["prefix_0"][path]["key"], pk, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(folded["prefix_0"][path]["value"], pv, rtol=1e-5, atol=1e-6)
    unfolded = run(method, leaves, IDS)
    now = run(method, folded, IDS)
    np.testing.assert_allclose(now[0], unfolded[0], atol=1e-6)
    flat = run(METHODS["flat"], folded, IDS)[0]  # a folded one is a flat one
    np.testing.assert_allclose(flat, unfolded[0], atol=1e-6)
    again = jpeft.fold(method, folded)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (again, folded)), strict=True))


@pytest.mark.parametrize("hidden", [8, None])
def test_a_gate_scales_keys_and_values_by_example(hidden):
    """By hand: the mean of sigmoid(x w + b) over a row's real tokens; what padding holds does not count."""
    method, rng = jpeft.prefix(3, hidden, gate=True), np.random.default_rng(0)
    leaves = randomise(jpeft.init(method, jax.random.key(1), SITES), 3, 0.8)
    own, shared = leaves["prefix_0"][CORES[0]], leaves["prefix_0"].get(SHARED, {})
    hidden_states = rng.normal(size=(3, 5, 16)).astype(np.float32)
    query, key, value = (rng.normal(size=(3, 2, 5, 8)).astype(np.float32) for _ in range(3))
    lengths = [5, 2, 4]
    mask = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int32)
    seen = np.broadcast_to(mask[:, None, None] > 0, (3, 1, 5, 5))

    def core(*args):
        return Core(0.0).apply({}, *args, train=False)

    def run_at(own, shared, x):
        args = tuple(map(jnp.asarray, (x, query, key, value, seen)))
        site = Site(CORES[0], 0, "Core", {}, ())
        return method.wrap(own, site, core, args, Context(False, None, jnp.asarray(mask), {}, shared))

    now = run_at(own, shared, hidden_states)
    folded = jpeft.fold(method, leaves)["prefix_0"]
    assert jax.tree.map(jnp.shape, folded[CORES[0]]) == {
        "key": (3, 16), "value": (3, 16), "gate": {"kernel": (16, 1), "bias": (1,)},
    }  # fmt: skip
    np.testing.assert_allclose(run_at(folded[CORES[0]], {}, hidden_states), now, atol=1e-6)
    np.testing.assert_array_equal(run_at(own, shared, np.where(mask[..., None] > 0, hidden_states, 9.0)), now)
    gate, (pk, pv) = f64(own["gate"]), keys_values({k: v for k, v in own.items() if k != "gate"}, shared)
    for row, n in enumerate(lengths):
        z = np.asarray(hidden_states[row, :n], np.float64) @ gate["kernel"][:, 0] + gate["bias"][0]
        opened = np.mean(1 / (1 + np.exp(-z)))
        part = (x[row : row + 1] for x in (*f64((query, key, value)), seen))
        np.testing.assert_allclose(now[row], attention(*part, opened * pk, opened * pv)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_padding_changes_nothing(kind):
    lengths = [6, 3, 4]
    mask = (np.arange(6) < np.array(lengths)[:, None]).astype(np.int32)
    together = run(METHODS[kind], LEAVES[kind], IDS, mask)[0]
    for i, n in enumerate(lengths):
        alone = jpeft.apply(MODEL, METHODS[kind], {"params": PARAMS, "peft": LEAVES[kind]}, IDS[i : i + 1, :n])[0]
        np.testing.assert_allclose(together[i], alone[0], atol=2e-6)


def test_packed_rows():
    """One copy of the prefix serves every segment of a row."""
    a, b, c = IDS[0, :5], IDS[1, :3], IDS[2, :4]
    packed = jnp.concatenate([a, b, c])[None]
    segments = jnp.array([[1] * 5 + [2] * 3 + [3] * 4])
    positions = jnp.concatenate([jnp.arange(n) for n in (5, 3, 4)])[None]
    method, leaves = METHODS["mlp"], LEAVES["mlp"]
    states = run(method, leaves, packed, segments, None, positions)[1].hidden_states
    start = 0
    for part in (a, b, c):
        variables = {"params": PARAMS, "peft": leaves}
        alone = jpeft.apply(MODEL, method, variables, part[None])[1].hidden_states
        for now, wanted in zip(states, alone, strict=True):
            np.testing.assert_allclose(now[0, start : start + len(part)], wanted[0], atol=3e-6)
        start += len(part)


def test_bfloat16():
    model = Bert(BertConfig(**SHAPE, dtype="bfloat16"))
    now, seen = run(METHODS["mlp"], LEAVES["mlp"], IDS, model=model)
    assert seen.hidden_states[-1].dtype == jnp.bfloat16
    assert 0 < np.abs(now - run(METHODS["mlp"], LEAVES["mlp"], IDS)[0]).max() < 0.2


def test_shapes_and_initial_values_with_an_mlp():
    leaves = jpeft.init(jpeft.prefix(40, 50), jax.random.key(1), SITES)["prefix_0"]
    linear = {"kernel": (50, 16), "bias": (16,)}
    assert jax.tree.map(jnp.shape, leaves) == {
        SHARED: {"embedding": (40, 16), "mlp": {"kernel": (16, 50), "bias": (50,)}},
        **{path: {"key": linear, "value": linear} for path in CORES},
    }
    assert float(leaves[SHARED]["embedding"].std()) == pytest.approx(1.0, rel=0.1)
    assert abs(float(leaves[SHARED]["embedding"].mean())) < 0.15
    for p, n_in in ((leaves[SHARED]["mlp"], 16), (leaves[CORES[0]]["key"], 50), (leaves[CORES[1]]["value"], 50)):
        bound = n_in**-0.5
        assert 0.95 * bound < float(jnp.abs(p["kernel"]).max()) <= bound
        assert float(p["kernel"].std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert 0.5 * bound < float(jnp.abs(p["bias"]).max()) <= bound
    drawn = [leaves[path][name]["kernel"] for path in CORES for name in ("key", "value")]
    assert all(float(jnp.abs(x - y).max()) > 0.05 for i, x in enumerate(drawn) for y in drawn[:i])


def test_shapes_and_initial_values_when_flat():
    leaves = jpeft.init(jpeft.prefix(40, None, layers=[1]), jax.random.key(1), SITES)["prefix_0"]
    assert jax.tree.map(jnp.shape, leaves) == {CORES[1]: {"key": (40, 16), "value": (40, 16)}}
    for x in jax.tree.leaves(leaves):
        assert float(x.std()) == pytest.approx(0.02, rel=0.1)
    assert float(jnp.abs(leaves[CORES[1]]["key"] - leaves[CORES[1]]["value"]).max()) > 0.01


def test_the_shared_part_is_the_same_for_any_choice_of_layers(key):
    one = jpeft.init(jpeft.prefix(3, 8, layers=[1]), key, SITES)["prefix_0"]
    both = jpeft.init(jpeft.prefix(3, 8), key, SITES)["prefix_0"]
    assert set(one) == {SHARED, CORES[1]}
    for name in one:
        jax.tree.map(np.testing.assert_array_equal, one[name], both[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be positive, got 0"),
        ({"num_virtual_tokens": -1, "mlp_hidden": None}, "num_virtual_tokens must be positive"),
        ({"mlp_hidden": 0}, "mlp_hidden must be positive, got 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        jpeft.prefix(**options)


def test_a_target_that_is_not_there():
    with pytest.raises(UserError, match="matches no site"):
        jpeft.init(jpeft.prefix(targets="attention/cores"), jax.random.key(0), SITES)
    with pytest.raises(UserError, match="layer 2 has no site"):
        jpeft.init(jpeft.prefix(layers=[2]), jax.random.key(0), SITES)


ROBERTA = BertConfig(**SHAPE, model_type="roberta", type_vocab_size=1, pad_token_id=1)


@pytest.mark.parametrize("config", [MODEL.config, ROBERTA], ids=["bert", "roberta"])
@pytest.mark.parametrize("hidden", [8, None])
def test_shifted_positions_are_those_that_start_behind_the_prefix(config, hidden):
    """The model is told so, row by row, by explicit positions; on padded rows, in training, and after folding."""
    model, told, shifted = Bert(config), jpeft.prefix(3, hidden), jpeft.prefix(3, hidden, shift_positions=True)
    sites = jpeft.sites(model, IDS)
    params = randomise(jax.eval_shape(lambda: model.init(jax.random.key(0), IDS)["params"]), 1)
    leaves = randomise(jpeft.init(told, jax.random.key(1), sites), 2, 0.8)["prefix_0"]
    fresh = jpeft.init(shifted, jax.random.key(1), sites)["prefix_0"]
    assert fresh["embeddings/inputs"] == {}
    assert set(fresh) == {*leaves, "embeddings/inputs"}
    mask = jnp.asarray(np.arange(6) < np.array([[6], [3], [4]]), jnp.int32)

    @jax.jit
    def run(leaves):
        def logits(method, own, *args, **kwargs):
            variables = {"params": params, "peft": {"prefix_0": own}}
            return jpeft.apply(model, method, variables, IDS, mask, None, *args, **kwargs)[0]

        positions = jnp.broadcast_to(3 + jnp.arange(6)[None], IDS.shape)
        training = {"train": True, "rngs": {"dropout": jax.random.key(3)}}
        own = {**leaves, "embeddings/inputs": {}}
        folded = jpeft.fold(shifted, {"prefix_0": own})["prefix_0"]
        return {
            "plain": logits(told, leaves),
            "wanted": (logits(told, leaves, positions), logits(told, leaves, positions, **training)),
            "now": (logits(shifted, own), logits(shifted, own, **training)),
            "folded": logits(shifted, folded),
        }

    out = jax.tree.map(np.asarray, run(leaves))
    for now, wanted in zip(out["now"], out["wanted"], strict=True):
        np.testing.assert_allclose(now, wanted, atol=2e-6)
    np.testing.assert_allclose(out["folded"], out["wanted"][0], atol=2e-6)
    assert np.abs(out["plain"] - out["now"][0]).max() > 1e-2


@pytest.mark.parametrize(("config", "longest"), [(MODEL.config, 12), (ROBERTA, 10)], ids=["bert", "roberta"])
def test_shifted_positions_leave_room_for_fewer_tokens(config, longest):
    model, method = Bert(config), jpeft.prefix(3, None, shift_positions=True)
    leaves = jax.eval_shape(lambda: jpeft.init(method, jax.random.key(0), jpeft.sites(model, IDS)))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS)["params"])

    def run(tokens, positions=None):
        ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        variables = {"params": params, "peft": leaves}
        return jax.eval_shape(lambda v, ids: jpeft.apply(model, method, v, ids, positions=positions), variables, ids)

    run(longest - 3)
    for tokens in (longest - 2, longest):
        with pytest.raises(UserError, match=rf"^input of {tokens} tokens; .* this model takes {longest - 3} at most"):
            run(tokens)
    with pytest.raises(UserError, match=f"{longest + 1} tokens; this model takes {longest} at most"):
        run(longest + 1)
    several = np.broadcast_to(np.tile(np.arange(8), 2)[None], (2, 16))
    run(16, several)  # texts in a row have positions of their own


def test_shifted_positions_of_packed_rows():
    """Every text of a row starts behind the prefix."""
    method = jpeft.prefix(3, None, shift_positions=True)
    leaves = {"prefix_0": {**LEAVES["flat"]["prefix_0"], "embeddings/inputs": {}}}
    packed = jnp.concatenate([IDS[0, :5], IDS[1, :3]])[None]
    segments, positions = jnp.array([[1] * 5 + [2] * 3]), jnp.concatenate([jnp.arange(5), jnp.arange(3)])[None]
    states = run(method, leaves, packed, segments, None, positions)[1].hidden_states[-1]
    for row, at, n in ((0, 0, 5), (1, 5, 3)):
        alone = run(method, leaves, IDS[row : row + 1, :n])[1].hidden_states[-1]
        np.testing.assert_allclose(states[0, at : at + n], alone[0], atol=3e-6)


def test_it_cannot_be_merged():
    merged = jpeft.merge(METHODS["mlp"], LEAVES["mlp"], PARAMS)
    assert merged.params is PARAMS
    assert merged.leaves["prefix_0"] is LEAVES["mlp"]["prefix_0"]
