"""Task vectors: against loops over entries, and against what the papers say of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft import UserError
from jpeft.core import tree

RNG = np.random.default_rng(0)
START = {
    "a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "b": {"c": jnp.asarray(RNG.normal(size=5), jnp.float32)},
}


def trained(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), START)


MODELS = [trained(seed) for seed in (1, 2, 3)]


def flat(model):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(model)])


def test_task_arithmetic_is_a_sum_of_differences():
    weights = [0.5, -0.25, 2.0]
    got = flat(jpeft.task_arithmetic(START, MODELS, weights))
    for i, at in enumerate(flat(START)):
        assert got[i] == pytest.approx(
            at + sum(w * (flat(m)[i] - at) for w, m in zip(weights, MODELS, strict=True)), abs=1e-5
        )
    np.testing.assert_allclose(flat(jpeft.task_arithmetic(START, MODELS)), np.mean([*map(flat, MODELS)], 0), atol=1e-6)


def test_ties_is_that_of_a_loop():
    start, models, density = flat(START), [*map(flat, MODELS)], 0.5
    got = flat(jpeft.ties(START, MODELS, density, scale=0.7))
    vectors = [model - start for model in models]
    kept = [set(np.argsort(-np.abs(v))[:9]) for v in vectors]  # half of 17 entries, rounded up
    seen = 0
    for i, at in enumerate(start):
        values = [v[i] for v, k in zip(vectors, kept, strict=True) if i in k]
        agreeing = [x for x in values if x * sum(values) > 0]
        seen += len(values) > len(agreeing) > 0
        assert got[i] == pytest.approx(at + 0.7 * (sum(agreeing) / len(agreeing) if agreeing else 0.0), abs=1e-5)
    assert seen  # somewhere, signs did not agree


def test_one_model_survives_ties_as_its_largest_entries():
    np.testing.assert_allclose(flat(jpeft.ties(START, MODELS[:1], 1.0)), flat(MODELS[0]), atol=1e-6)
    moved = flat(jpeft.ties(START, MODELS[:1], 3 / 17)) - flat(START)
    assert np.flatnonzero(moved).tolist() == sorted(np.argsort(-np.abs(flat(MODELS[0]) - flat(START)))[:3])


def test_what_no_model_moved_is_not_counted():
    """Indices, and parameters that were frozen."""
    start = {"x": np.zeros(10, np.float32)}
    model = {"x": np.arange(1, 11, dtype=np.float32)}
    more = {"index": np.arange(30), "frozen": np.ones(50, np.float32)}
    for rest in ({}, more):
        found = jpeft.ties({**start, **rest}, [{**model, **rest}], density=0.2)
        assert found["x"].tolist() == [0] * 8 + [9, 10]
    np.testing.assert_array_equal(jpeft.ties(model, [model])["x"], model["x"])


def test_dare_keeps_the_mean_and_drops_the_rest():
    start, model = {"w": jnp.zeros(20_000)}, {"w": jnp.ones(20_000)}
    got = np.asarray(jpeft.dare(jax.random.key(0), start, model, 0.1)["w"])
    assert set(np.unique(got)) == {0.0, 10.0}
    assert got.mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(got, jpeft.dare(jax.random.key(0), start, model, 0.1)["w"])
    assert np.any(got != jpeft.dare(jax.random.key(1), start, model, 0.1)["w"])
    np.testing.assert_array_equal(jpeft.dare(jax.random.key(0), start, model, 1.0)["w"], model["w"])


def test_merged_modules_of_two_methods_add_up(toy, key):
    merged = []
    for method, seed in ((jpeft.lora(2), 1), (jpeft.ia3(), 2)):
        leaves = randomised(jpeft.init(method, key, toy.sites, toy.params), seed=seed, scale=0.1)
        merged.append(jpeft.merge(method, leaves, toy.params).params)
    both = tree.flatten(jpeft.task_arithmetic(toy.params, merged, [1.0, 1.0]))
    for path, x in tree.flatten(toy.params).items():
        one, other = (np.asarray(tree.flatten(each)[path]) for each in merged)
        np.testing.assert_allclose(both[path], one + other - np.asarray(x), atol=1e-6)


def test_indices_and_dtypes_are_those_of_the_start():
    start = {"index": jnp.arange(3), "w": jnp.ones(3, jnp.bfloat16)}
    model = {"index": jnp.arange(3), "w": jnp.full(3, 2, jnp.bfloat16)}
    got = jpeft.ties(start, [model, model], 1.0)
    assert (got["index"].dtype, got["w"].dtype) == (jnp.int32, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got["w"], np.float32), 2.0)
    with pytest.raises(UserError, match="model 1, index: int32 leaves must be those of the start"):
        jpeft.ties(start, [model, {**model, "index": jnp.arange(3) + 1}])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jpeft.task_arithmetic(START, []), "at least one model"),
        (lambda: jpeft.task_arithmetic(START, MODELS, [1.0]), "a finite weight for each of 3 models"),
        (lambda: jpeft.task_arithmetic(START, MODELS, [1.0, 2.0, float("nan")]), "finite weight"),
        (lambda: jpeft.task_arithmetic(START, [{"a": START["a"]}]), "model 0 has other leaves"),
        (lambda: jpeft.ties(START, [{**START, "a": jnp.zeros((3, 5))}]), r"model 0, a: expected \(3, 4\) of float32"),
        (lambda: jpeft.ties(START, [{**START, "a": START["a"] * jnp.nan}]), "model 0, a is not finite"),
        (lambda: jpeft.ties(START, MODELS, 0.0), "density must be above 0"),
        (lambda: jpeft.ties(START, MODELS, scale=float("inf")), "scale must be a finite number"),
        (lambda: jpeft.dare(jax.random.key(0), START, MODELS[0], 1.5), "density must be above 0"),
        (lambda: jpeft.task_arithmetic(START, MODELS[:1], [10**400]), "a finite weight for each of 1 models"),
        (lambda: jpeft.ties(START, [{**START, "a": START["a"] + 1}], scale=10**400), "scale must be a finite number"),
        (lambda: jpeft.ties({**START, "a": START["a"] * jnp.nan}, MODELS), "the start, a is not finite"),
        (lambda: jpeft.ties({}, [{}]), "expected models with entries"),
        (lambda: jpeft.ties({"z": jnp.zeros(0)}, [{"z": jnp.zeros(0)}]), "expected models with entries"),
        (lambda: jpeft.dare(jax.random.split(jax.random.key(0), 3), START, MODELS[0]), r"one key, got .* shape \(3,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined(call, says):
    with pytest.raises(UserError, match=says):
        call()


def full(value, dtype="float32"):
    return {"a": {"w": jnp.full(64, value, dtype)}}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jpeft.task_arithmetic(full(0), [full(1)], [1e39]), r"a/w, with weights \[1e\+39\]: .* in float32"),
        (lambda: jpeft.task_arithmetic(full(0), [full(1e38)] * 2, [10, 10]), r"a/w, with weights \[10, 10\]"),
        (lambda: jpeft.task_arithmetic(full(0, "float16"), [full(6e4, "float16")], [2.0]), "not finite in float16"),
        (lambda: jpeft.task_arithmetic(jnp.zeros(2), [jnp.ones(2)], [1e39]), "the only leaf, with weights"),
        (lambda: jpeft.ties(full(0), [full(1e38)], 1.0, scale=100.0), "a/w, with scale 100.0: the result"),
        (lambda: jpeft.dare(jax.random.key(0), full(0), full(3e38), 0.5), "a/w, with density 0.5: the result"),
        (lambda: jpeft.task_arithmetic(full(-3e38), [full(3e38)]), "model 0, a/w is so far from the start"),
    ],
)  # fmt: skip
def test_no_infinity_comes_out_of_finite_models(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_double_precision_stays():
    with jax.enable_x64(True):
        start = {"w": jnp.asarray(RNG.normal(size=7))}
        model = {"w": start["w"] + jnp.asarray(RNG.normal(size=7))}
        assert start["w"].dtype == jnp.float64
        for moved in (
            jpeft.task_arithmetic(start, [model]), jpeft.ties(start, [model], density=1.0),
            jpeft.dare(jax.random.key(0), start, model, density=1.0),
        ):  # fmt: skip
            np.testing.assert_allclose(moved["w"], model["w"], rtol=1e-14)
