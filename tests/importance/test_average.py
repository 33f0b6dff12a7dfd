"""Fisher-weighted averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import UserError

ONE, TWO = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.array([0.0])}, {"w": jnp.array([[3.0, 6.0]]), "b": jnp.array([1.0])}
F_ONE, F_TWO = {"w": jnp.array([[3.0, 0.0]]), "b": jnp.ones(1)}, {"w": jnp.array([[1.0, 0.0]]), "b": jnp.zeros(1)}


def test_entries_are_weighted_by_information_over_its_norm():
    got = jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO])
    one, two = 3 / 10**0.5, 1.0  # the norms are sqrt(10) and 1
    np.testing.assert_allclose(got["w"], [[(one * 1 + two * 3) / (one + two), 2.0]], rtol=1e-5)
    np.testing.assert_allclose(got["b"], [0.0], atol=1e-5)
    weighted = jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO], [1.0, 9.0], normalize=False)
    np.testing.assert_allclose(weighted["w"], [[(3 * 1 + 9 * 3) / 12, 2.0]], rtol=1e-5)


def test_at_the_magnitudes_of_an_encoder_it_is_far_from_the_plain_mean():
    """Information of a real encoder: most entries below 1e-9, six decades apart, one model's gradients larger."""
    rng = np.random.default_rng(0)
    models = [rng.normal(size=(200, 50)) for _ in range(2)]
    fishers = [scale * np.exp(3 * rng.normal(size=(200, 50))) for scale in (1e-11, 1e-9)]
    assert np.median(fishers) < 1e-9
    got = jpeft.fisher_average(*([{"w": jnp.float32(x)} for x in trees] for trees in (models, fishers)))["w"]
    shares = [f / np.linalg.norm(f) for f in fishers]
    shares[0] = np.maximum(shares[0], 1e-10)
    wanted = sum(s * m for s, m in zip(shares, models, strict=True)) / sum(shares)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    plain = np.mean(models, axis=0)
    assert np.median(np.abs(got - plain) / np.abs(models[0] - models[1])) > 0.3  # 0.5 is one of the two


def test_two_halves_of_a_regression_give_the_whole():
    """Least squares is normal exactly: with the full information diagonal, averaging is solving all data at once."""
    rng = np.random.default_rng(0)
    scale, y = rng.uniform(0.5, 2.0, (2, 50, 3)), rng.normal(size=(2, 50, 3))
    fit = lambda x, y: (x * y).sum(0) / (x * x).sum(0)  # each coefficient has data of its own
    models = [jnp.asarray(fit(scale[i], y[i]), jnp.float32) for i in range(2)]
    information = [jnp.asarray((scale[i] ** 2).sum(0), jnp.float32) for i in range(2)]
    whole = fit(scale.reshape(-1, 3), y.reshape(-1, 3))
    np.testing.assert_allclose(jpeft.fisher_average(models, information, normalize=False), whole, rtol=1e-5)


def test_modules_of_two_seeds_merge_towards_the_more_informed(toy, key):
    method = jpeft.lora(2)
    leaves = [jax.tree.map(lambda x, k=k: jax.random.normal(jax.random.key(k), x.shape),
                           jpeft.init(method, key, toy.sites)) for k in (1, 2)]  # fmt: skip

    def loss(leaves, example):
        ids, mask, label = example
        return -jax.nn.log_softmax(toy.logits(method, leaves, ids=ids[None], mask=mask[None])[0])[label]

    fishers = [jpeft.fisher(loss, own, (toy.ids, toy.mask, toy.labels)) for own in leaves]
    got = jpeft.fisher_average(leaves, fishers)
    fishers = [jax.tree.map(lambda x, f=f: x / optax.tree.norm(f), f) for f in fishers]
    for x, a, b, f, g in zip(*map(jax.tree.leaves, (got, *leaves, *fishers)), strict=True):
        assert ((x >= jnp.minimum(a, b) - 1e-5) & (x <= jnp.maximum(a, b) + 1e-5)).all()
        nearer = jnp.abs(x - a) < jnp.abs(x - b)
        sure = jnp.maximum(f, g) > 2 * jnp.maximum(jnp.minimum(f, g), 1e-9)
        assert sure.mean() > 0.1
        assert (nearer == (f > g))[sure].all()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="got 1 models, 2 Fishers"):
        jpeft.fisher_average([ONE], [F_ONE, F_TWO])
    with pytest.raises(UserError, match="same structure"):
        jpeft.fisher_average([ONE, {"w": ONE["w"]}], [F_ONE, F_TWO])
    with pytest.raises(UserError, match="weights must be"):
        jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO], [0.0, 0.0])
    with pytest.raises(UserError, match="weights must be"):
        jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO], [1.0, float("nan")])
    with pytest.raises(UserError, match="information of model 1 has norm 0"):
        jpeft.fisher_average([ONE, TWO], [F_ONE, jax.tree.map(jnp.zeros_like, F_TWO)])


def changed(model, name, value):
    return {**model, name: model[name].at[0].set(value)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_models_that_are_not_finite(value):
    with pytest.raises(UserError, match="model 1, b is not finite"):
        jpeft.fisher_average([ONE, changed(TWO, "b", value)], [F_ONE, F_TWO])
    with pytest.raises(UserError, match="model 0, b is not finite"):
        jpeft.fisher_average([changed(ONE, "b", value), TWO], [F_ONE, F_TWO])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_information_that_is_none(value):
    with pytest.raises(UserError, match="information of model 1 has entries that are negative or not finite"):
        jpeft.fisher_average([ONE, TWO], [F_ONE, changed(F_TWO, "b", value)])


def test_weights_and_floors_of_any_size():
    got = jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO], [1e39, 1.0])
    np.testing.assert_allclose(got["w"], ONE["w"], rtol=1e-5)
    large = jax.tree.map(lambda x: jnp.full_like(x, 3e38), ONE)
    assert jnp.isfinite(jpeft.fisher_average([large, large], [F_ONE, F_TWO])["w"]).all()
    for weights, floor in (([10**400, 1], 1e-10), ([1, 1], float("inf")), ([1, 1], 10**400)):
        with pytest.raises(UserError, match="weights must be 0 or more and finite"):
            jpeft.fisher_average([ONE, TWO], [F_ONE, F_TWO], weights, floor=floor)
    with pytest.raises(UserError, match=r"with weights \[1e\+300, 1\.0\] and floor 1e-10: the result is not finite"):
        jpeft.fisher_average([large, large], [F_ONE, F_TWO], [1e300, 1.0])


def test_leaves_that_are_not_floats_are_kept_and_must_be_alike():
    index = lambda at: {"index": jnp.arange(3) + at, "w": jnp.ones(2, jnp.bfloat16)}
    fishers = [{"index": jnp.ones(3), "w": jnp.ones(2)}] * 2
    got = jpeft.fisher_average([index(0), index(0)], fishers)
    assert (got["index"].dtype, got["index"].tolist(), got["w"].dtype) == (jnp.int32, [0, 1, 2], jnp.bfloat16)
    with pytest.raises(UserError, match="model 1, index: int32 leaves must be those of model 0"):
        jpeft.fisher_average([index(0), index(1)], fishers)
