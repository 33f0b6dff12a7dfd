"""SparseAdapter and its scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised, setting

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.core.transform import FIXED
from jpeft.transforms.sparse_adapter import grasp, magnitude, snip, sparse_adapter, synflow

B = 4  # the toy's hidden size is 16, so its two pfeiffer adapters have 2 * 2 * 16 * 4 = 256 entries in kernels
WIDTHS = {"down": (16, B), "up": (B, 16)}


def dense(leaves):
    """Pruned leaves as dense ones, entry by entry."""

    def half(own, name):
        kernel = np.zeros(np.prod(WIDTHS[name]), np.float32)
        for i, value in zip(own["kernel"][FIXED]["index"], own["kernel"]["values"], strict=True):
            kernel[int(i)] = value
        return {"kernel": jnp.asarray(kernel.reshape(WIDTHS[name])), "bias": own["bias"]}

    return {path: {name: half(own[name], name) for name in WIDTHS} for path, own in leaves.items()}


def kept(leaves):
    """{(path, half, flat index)}."""
    return {
        (path, half, int(i))
        for path, own in leaves.items()
        for half in WIDTHS
        for i in own[half]["kernel"][FIXED]["index"]
    }


def best(scores, n):
    flat = [(float(v), (path, half, i)) for path, own in scores.items() for half in WIDTHS
            for i, v in enumerate(np.asarray(own[half]).ravel())]  # fmt: skip
    return {place for _, place in sorted(flat, reverse=True)[:n]}


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_equals_dense_adapters_with_zeros(toy, key, kind):
    method = sparse_adapter(0.3, "random", kind, B)
    trains, fixed = split(jpeft.init(method, key, toy.sites))
    leaves = tree.union(randomised(trains, scale=0.5), fixed)
    full = {f"{kind}_0": dense(leaves["sparse_adapter_0"])}
    zeros = np.concatenate(
        [np.asarray(own[h]["kernel"]).ravel() == 0 for own in full[f"{kind}_0"].values() for h in WIDTHS]
    )
    assert 1 - zeros.mean() == pytest.approx(0.3, abs=1 / zeros.size)
    now = toy.logits(method, leaves)
    np.testing.assert_allclose(now, toy.logits(getattr(jpeft, kind)(B), full), atol=1e-5)
    assert np.abs(now - toy.logits(jpeft.chain(), {})).max() > 0.01


@pytest.mark.parametrize("score", ["random", "magnitude", "synflow", "snip", "grasp"])
def test_the_number_of_entries_is_that_of_the_density_over_all_kernels(toy, key, score):
    method = sparse_adapter(0.4, score, bottleneck=B, num_examples=1)
    case = setting(toy, method, key)
    for leaves in (case.variables["peft"], jpeft.prepare(method, case)):
        trains, _ = split(leaves)
        assert tree.count(trains) == int(0.4 * 256) + 2 * (B + 16)
        indices = [own[h]["kernel"][FIXED]["index"] for own in leaves["sparse_adapter_0"].values() for h in WIDTHS]
        assert all((np.diff(i) > 0).all() and i.dtype == jnp.int32 for i in indices)


def fresh_kernels(toy, key):
    """The kernels that the method draws before it prunes, from a density of 1."""
    leaves = jpeft.init(sparse_adapter(1.0, "magnitude", bottleneck=B), key, toy.sites)["sparse_adapter_0"]
    return {path: {half: own[half]["kernel"] for half in WIDTHS} for path, own in dense(leaves).items()}


@pytest.mark.parametrize("score", ["magnitude", "synflow"])
def test_what_is_kept_without_data(toy, key, score):
    kernels = fresh_kernels(toy, key)
    leaves = jpeft.init(sparse_adapter(0.4, score, bottleneck=B), key, toy.sites)["sparse_adapter_0"]
    values = jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), kernels)
    if score == "synflow":
        values = {path: flows(own["down"], own["up"]) for path, own in values.items()}
    assert kept(leaves) == best(values, int(0.4 * 256))
    for path, own in leaves.items():  # the kept ones have the values that they would have had in a dense adapter
        for half in WIDTHS:
            entries = np.asarray(kernels[path][half]).ravel()[own[half]["kernel"][FIXED]["index"]]
            np.testing.assert_array_equal(own[half]["kernel"]["values"], entries)


def flows(down, up):
    """Path by path: each goes in at i, through j, out at k."""
    scores = {"down": np.zeros(down.shape), "up": np.zeros(up.shape)}
    for i, j, k in np.ndindex(down.shape[0], down.shape[1], up.shape[1]):
        flow = down[i, j] * up[j, k]
        scores["down"][i, j] += flow
        scores["up"][j, k] += flow
    return scores


def test_random_ones_differ_by_key_and_are_spread(toy):
    method = sparse_adapter(0.5, "random", bottleneck=B)
    one, two = (kept(jpeft.init(method, jax.random.key(i), toy.sites)["sparse_adapter_0"]) for i in (0, 1))
    assert 30 < len(one & two) < 100  # of 128; 64 expected
    assert 15 < sum(half == "up" and "layer_0" in path for path, half, _ in one) < 50  # 32 expected


def dense_loss(toy, key):
    """Kernels as one vector -> mean loss of the first two examples, with plain Pfeiffer adapters."""
    kernels = fresh_kernels(toy, key)
    flat, unravel = jax.flatten_util.ravel_pytree(kernels)

    def loss(vector):
        own = {
            path: {h: {"kernel": k[h], "bias": jnp.zeros(k[h].shape[1])} for h in WIDTHS}
            for path, k in unravel(vector).items()
        }
        logits = toy.logits(jpeft.pfeiffer(B), {"pfeiffer_0": own}, ids=toy.ids[:2], mask=toy.mask[:2])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), toy.labels[:2, None], axis=1).mean()

    return loss, flat, unravel


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_what_is_kept_by_data(toy, key, score):
    """Against the gradient of plain dense adapters, and for GraSP a Hessian that is written out."""
    method = sparse_adapter(0.1, score, bottleneck=B, num_examples=2)
    case = setting(toy, method, key)
    leaves = jpeft.prepare(method, case)["sparse_adapter_0"]
    loss, flat, unravel = dense_loss(toy, key)
    g = np.asarray(jax.jit(jax.grad(loss))(flat), np.float64)
    if score == "snip":
        scores = np.abs(np.asarray(flat) * g)
    else:
        scores = np.asarray(flat) * (np.asarray(jax.jit(jax.jacfwd(jax.grad(loss)))(flat), np.float64) @ g)
    n, scores = int(0.1 * 256), scores / np.abs(scores).max()
    border, by_place, now = np.sort(scores)[-n], unravel(jnp.asarray(scores, jnp.float32)), kept(leaves)
    certain, possible = (
        {place for place in best(by_place, 256) if _at(by_place, place) > border + margin} for margin in (1e-5, -1e-5)
    )
    assert len(now) == n
    assert certain <= now <= possible
    assert len(possible) - len(certain) < 10  # few are so close that rounding decides
    assert now != kept(case.variables["peft"]["sparse_adapter_0"])


def _at(scores, place):
    path, half, i = place
    return float(np.asarray(scores[path][half]).ravel()[i])


def quadratic(kernels, x, shift):
    """A loss with a Hessian that is not diagonal."""
    w = jnp.concatenate([kernels["a"].ravel(), kernels["b"].ravel()])
    return jnp.sin(w @ x) + ((w - shift) ** 2 * x).sum() + (w @ x) ** 2


def small():
    kernels = {"a": jnp.array([[0.3, -0.7]]), "b": jnp.array([[0.5], [0.2], [-0.4]])}
    return kernels, jax.random.normal(jax.random.key(0), (4, 5)), jnp.float32(0.1)


def as_vector(kernels):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in (kernels["a"], kernels["b"])])


def numpy_loss(w, xs, shift):
    return np.mean([np.sin(w @ x) + ((w - shift) ** 2 * x).sum() + (w @ x) ** 2 for x in xs])


def gradient(w, xs, shift, h=1e-5):
    return np.array(
        [(numpy_loss(w + h * e, xs, shift) - numpy_loss(w - h * e, xs, shift)) / (2 * h) for e in np.eye(5)]
    )


def test_snip_against_finite_differences():
    kernels, xs, shift = small()
    w, data = as_vector(kernels), np.asarray(xs, np.float64)
    by_mask = []  # the derivative by a mask on each entry
    for e in np.eye(5):
        high, low = (numpy_loss(w * (1 + h * e), data, 0.1) for h in (1e-5, -1e-5))
        by_mask.append(abs(high - low) / 2e-5)
    np.testing.assert_allclose(as_vector(snip(quadratic, kernels, xs, shift)), by_mask, rtol=1e-3)


def test_grasp_is_what_an_entry_does_for_the_squared_gradient():
    kernels, xs, shift = small()
    w, data = as_vector(kernels), np.asarray(xs, np.float64)
    wanted = []
    for e in np.eye(5):  # d |g|^2 / dm = 2 w (H g)
        high, low = (np.square(gradient(w * (1 + h * e), data, 0.1)).sum() for h in (1e-3, -1e-3))
        wanted.append((high - low) / 2e-3 / 2)
    assert min(wanted) < 0 < max(wanted)
    np.testing.assert_allclose(as_vector(grasp(quadratic, kernels, xs, shift)), wanted, rtol=2e-3)


def test_plain_scores():
    own = {"down": jnp.array([[1.0, -2.0]]), "up": jnp.array([[-3.0, 1.0], [0.5, 0.0]])}
    assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, magnitude({"x": own})["x"])) == {
        "down": [[1.0, 2.0]], "up": [[3.0, 1.0], [0.5, 0.0]],
    }  # fmt: skip
    np.testing.assert_allclose(synflow({"x": own})["x"]["down"], [[4.0, 1.0]])
    np.testing.assert_allclose(synflow({"x": own})["x"]["up"], [[3.0, 1.0], [1.0, 0.0]])


def test_a_kernel_that_keeps_nothing(toy, key):
    method = sparse_adapter(1 / 256, bottleneck=B)
    leaves = jpeft.init(method, key, toy.sites)
    assert len(kept(leaves["sparse_adapter_0"])) == 1
    grads = jax.grad(lambda x: toy.logits(method, tree.union(x, split(leaves)[1])).sum())(split(leaves)[0])
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, split(leaves)[0])
    assert np.isfinite(toy.logits(method, leaves)).all()


def test_large_sparse_has_as_many_entries(toy, key):
    small, large = (
        kept(jpeft.init(sparse_adapter(d, bottleneck=b), key, toy.sites)["sparse_adapter_0"])
        for d, b in ((0.5, 4), (0.25, 8))
    )
    assert len(small) == len(large)


def test_errors(toy, key):
    for density in (0, 1.5):
        with pytest.raises(UserError, match="density must be above 0 and at most 1"):
            sparse_adapter(density)
    with pytest.raises(UserError, match="score 'snap' is unknown: did you mean 'snip'"):
        sparse_adapter(score="snap")
    with pytest.raises(UserError, match="kind 'parallel' is unknown"):
        sparse_adapter(kind="parallel")
    with pytest.raises(UserError, match="num_examples must be positive"):
        sparse_adapter(num_examples=0)
    with pytest.raises(UserError, match="activation 'rleu'"):
        sparse_adapter(activation="rleu")
    with pytest.raises(UserError, match="matches no site"):
        jpeft.init(sparse_adapter(targets="fnn"), key, toy.sites)
    method = sparse_adapter(score="snip", bottleneck=B)
    case = setting(toy, method, key)
    with pytest.raises(UserError, match="not finite"):
        jpeft.prepare(method, case._replace(loss=lambda variables, example: jnp.nan * case.loss(variables, example)))
