"""Masks of single entries: choosing, training and keeping them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import UserError
from jpeft.importance.masks import magnitude, packed, random, read_mask, top, write_mask

SCORES = {
    "several ties": {"a": [[3.0, 1.0], [2.0, 2.0]], "b": [2.0, 5.0], "c": [0.0]},
    "signs and zeros": {"a": [[-3.0, -0.0], [0.0, 1e-40]], "b": [-np.inf, np.inf], "c": [-1e30]},
    "all equal": {"a": [[1.0, 1.0], [1.0, 1.0]], "b": [1.0, 1.0], "c": [1.0]},
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", SCORES)
def test_top_is_a_stable_sort_over_all_arrays(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        scores = {name: jnp.asarray(x, dtype) for name, x in SCORES[case].items()}
        flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in scores.values()])
        if dtype != "float64":
            flat[np.abs(flat) < 1e-38] = 0  # as XLA takes what is denormal
        for k in range(8):
            chosen = top(scores, k)
            order = sorted(np.argsort(-flat, kind="stable")[:k])
            offset = {"a": 0, "b": 4, "c": 6}
            assert sorted(offset[name] + i for name, index in chosen.items() for i in index) == order
            assert all(index.dtype == np.int32 for index in chosen.values())


def test_top_of_many(key):
    scores = {name: jax.random.normal(k, (300, 70)) for name, k in zip("ab", jax.random.split(key), strict=True)}
    chosen = top(scores, 1234)
    kept = np.concatenate([np.asarray(scores[n]).ravel()[i] for n, i in chosen.items()])
    assert sorted(kept) == sorted(np.concatenate([np.ravel(x) for x in scores.values()]))[-1234:]


def test_controls(key):
    values = {"a": jnp.array([[1.0, -5.0], [0.5, 2.0]]), "b": jnp.array([-3.0])}
    assert {n: i.tolist() for n, i in magnitude(values, 3).items()} == {"a": [1, 3], "b": [0]}
    one, same, other = (
        random(k, {"a": jnp.ones((30, 4)), "b": jnp.ones(50)}, 60) for k in (key, key, jax.random.key(1))
    )
    chex.assert_trees_all_equal(one, same)
    assert sum(x.size for x in one.values()) == 60
    assert one["a"].tolist() != other["a"].tolist()
    for name, size in (("a", 120), ("b", 50)):
        assert (np.diff(one[name]) > 0).all()
        assert 0 <= one[name][0] <= one[name][-1] < size


PARAMS = {
    "some": jnp.array([[1.0, -0.0, 3.0], [0.0, 5.0, -6.0]]),
    "all": jnp.array([[0.5, -2.0]]),
    "none": jnp.array([0.0, -0.0, 1e-30, jnp.nan]),
}
MASK = {"some": np.array([0, 4], np.int32), "all": True, "none": False}
GRADS = {"some": jnp.full((2, 3), 2.0), "all": jnp.array([[3.0, -1.0]]), "none": jnp.full(4, 100.0)}
INNER = {
    "adamw": lambda: optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("inner", INNER)
def test_packed_is_the_optimiser_of_a_model_that_has_nothing_else(inner):
    chex.clear_trace_counter()
    optimizer, alone = packed(INNER[inner](), MASK), INNER[inner]()
    small = {"some": PARAMS["some"].ravel()[MASK["some"]], "all": PARAMS["all"]}
    params, state, small_state = PARAMS, optimizer.init(PARAMS), alone.init(small)
    step = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    for _ in range(3):
        updates, state = step(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        moves, small_state = alone.update({"some": jnp.full(2, 2.0), "all": GRADS["all"]}, small_state, small)
        small = optax.apply_updates(small, moves)
    np.testing.assert_allclose(params["some"].ravel()[MASK["some"]], small["some"], rtol=1e-6)
    np.testing.assert_allclose(params["all"], small["all"], rtol=1e-6)
    rest = np.setdiff1d(np.arange(6), MASK["some"])
    assert np.asarray(params["some"]).ravel()[rest].tobytes() == np.asarray(PARAMS["some"]).ravel()[rest].tobytes()
    assert np.asarray(params["none"]).tobytes() == np.asarray(PARAMS["none"]).tobytes()
    assert not np.array_equal(params["some"], PARAMS["some"])


def test_the_state_is_as_large_as_the_selection():
    state = packed(optax.adam(0.1), MASK).init(PARAMS)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 4 + 1
    empty = jax.tree.map(lambda x: np.zeros(0, np.int32), PARAMS)
    everything = jax.tree.map(lambda x: np.arange(x.size, dtype=np.int32), PARAMS)
    for mask, size in ((empty, 0), (everything, 12)):
        state = packed(optax.adam(0.1), mask).init(PARAMS)
        assert sum(x.size for x in jax.tree.leaves(state)) == 2 * size + 1


@pytest.mark.slow
def test_a_selection_over_base_and_modules_at_once(toy, key):
    """The Fisher information of both together chooses; one optimiser trains the choice."""
    method = jpeft.lora(2)
    both = {"params": toy.params, "peft": jpeft.init(method, key, toy.sites)}

    def loss(both, example):
        ids, mask, label = example
        logits = jpeft.apply(toy.model, method, both, ids[None], mask[None], mask=mask[None])[0]
        return -jax.nn.log_softmax(logits[0])[label]

    mask = top(jpeft.fisher(loss, both, (toy.ids, toy.mask, toy.labels)), 200)
    chosen = {part: sum(x.size for x in jax.tree.leaves(mask[part])) for part in both}
    assert chosen["params"] + chosen["peft"] == 200
    assert min(chosen.values()) > 0
    optimizer = packed(optax.sgd(0.1), mask)
    grads = jax.tree.map(jnp.ones_like, both)
    updates, _ = optimizer.update(grads, optimizer.init(both), both)
    now = optax.apply_updates(both, updates)
    assert sum(int((a != b).sum()) for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(both), strict=True)) == 200


def test_files_are_as_large_as_the_selection_and_know_their_model(tmp_path):
    path = tmp_path / "masks" / "mask.safetensors"
    write_mask(path, MASK, "model one")
    back = read_mask(path, PARAMS, "model one")
    assert back["all"] is True
    assert back["none"] is False
    np.testing.assert_array_equal(back["some"], MASK["some"])
    with pytest.raises(UserError, match="made for another model: model one, not model two"):
        read_mask(path, PARAMS, "model two")
    with pytest.raises(UserError, match="selects from all, which the model does not have"):
        read_mask(path, {"some": PARAMS["some"]}, "model one")
    with pytest.raises(UserError, match=r"mask of \['some'\] goes up to 4, but it has 2 entries"):
        read_mask(path, {**PARAMS, "some": jnp.ones(2)}, "model one")
    big = {"w": np.arange(0, 10**6, 10, dtype=np.int32)}
    write_mask(path, big, "m")
    assert path.stat().st_size <= 4.01 * 10**5
    path.write_bytes(b"no mask")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_mask(path, PARAMS, "m")
    with pytest.raises(UserError, match="there is no file"):
        read_mask(tmp_path / "other", PARAMS, "m")


def test_what_cannot_be_is_refused():
    scores = {"a": jnp.ones(3)}
    for k in (-1, 4, 2.0, True):
        with pytest.raises(UserError, match="k must be an integer from 0 to 3"):
            top(scores, k)
        with pytest.raises(UserError, match="k must be an integer from 0 to 3"):
            random(jax.random.key(0), scores, k)
    with pytest.raises(UserError, match="NaN"):
        top({"a": jnp.array([1.0, jnp.nan])}, 1)
    with pytest.raises(UserError, match="the scores are complex, which have no order"):
        top({"a": jnp.array([1.0, 2j])}, 1)
    with pytest.raises(UserError, match="does not fit"):
        packed(optax.sgd(0.1), {"a": True}).init({"b": jnp.ones(2)})


@pytest.mark.parametrize(
    "index", [[2, 1], [1, 1], [1, 0, 1, 0], [-1, 2], [[True, False]], [1.0, 2.0], [True, False], 3]
)
def test_what_is_no_mask_is_refused(tmp_path, index):
    """XLA is promised that indices ascend without repeats: nothing else would tell."""
    mask = {"a": np.array(index)}
    for use in (lambda: packed(optax.sgd(0.1), mask), lambda: write_mask(tmp_path / "mask", mask, "m")):
        with pytest.raises(UserError, match=r"mask of \['a'\] must be True, False or ascending indices"):
            use()


@pytest.mark.parametrize("index", [np.uint32([1, 2]), np.int64([1, 2]), jnp.array([1, 2]), np.False_, np.array([])])
def test_masks_of_any_dtype_come_back_as_they_were(tmp_path, index):
    write_mask(tmp_path / "mask", {"a": index, "b": {}}, "m")
    back = read_mask(tmp_path / "mask", {"a": jnp.ones(4), "b": {}}, "m")
    assert back["b"] == {}
    assert back["a"] is False if np.size(index) < 2 else back["a"].tolist() == [1, 2] and back["a"].dtype == np.int32


def test_scores_of_two_precisions():
    with jax.enable_x64(True):
        scores = {"a": jnp.float32([1.0, 5.0]), "b": jnp.float64([2.0, 0.5])}
        for order in (scores, {"a": scores["b"], "b": scores["a"]}):
            chosen = top(order, 2)
            assert sorted(float(x[i]) for x, n in zip(order.values(), chosen.values(), strict=True) for i in n) == [
                2,
                5,
            ]
    assert random(jax.random.key(0), {}, 0) == top({}, 0) == {}
