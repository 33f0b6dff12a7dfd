import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import randomised

import jpeft
from jpeft import UserError, fisher
from jpeft.importance import per_example
from jpeft.importance.fisher import accumulate, mean
from jpeft.models import Bert, BertConfig


def close_by_leaf(got, wanted, tolerance=1e-5):
    """norm(a - b) <= tolerance norm(b) + 1e-12 of the largest leaf, for every leaf."""
    largest = max(np.linalg.norm(x) for x in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * np.linalg.norm(b) + 1e-12 * largest


def loop(loss, tree, examples, n):
    total = jax.tree.map(np.zeros_like, tree)
    for i in range(n):
        grad = jax.grad(loss)(tree, jax.tree.map(lambda x, i=i: x[i], examples))
        total = jax.tree.map(lambda t, g: t + np.asarray(g) ** 2, total, grad)
    return jax.tree.map(lambda t: t / n, total)


@pytest.mark.parametrize("microbatch", [None, 3, 4])
def test_equals_a_loop_over_examples(toy, key, microbatch):
    method = jpeft.chain(jpeft.prefix(2, 4), jpeft.pfeiffer(2), jpeft.lora(2))
    leaves = randomised(jpeft.init(method, key, toy.sites))

    def loss(leaves, example):
        ids, mask, label = example
        return -jax.nn.log_softmax(toy.logits(method, leaves, ids=ids[None], mask=mask[None])[0])[label]

    examples = (toy.ids, toy.mask, toy.labels)
    close_by_leaf(fisher(loss, leaves, examples, microbatch=microbatch), loop(jax.jit(loss), leaves, examples, 4))


def test_equals_finite_differences_in_double_precision():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(5, 3)))
        loss = lambda w, row: jnp.sin(w @ row) ** 2
        step = 1e-6 * np.eye(3)
        wanted = np.mean([[((loss(w + d, row) - loss(w - d, row)) / 2e-6) ** 2 for d in step] for row in x], axis=0)
        got = fisher(loss, w, x, microbatch=2)
        assert got.dtype == np.float64
        assert np.allclose(got, wanted, atol=1e-8)
        close_by_leaf(got, loop(loss, w, x, 5), tolerance=1e-12)


def test_a_mean_of_squares_is_not_the_square_of_a_mean():
    # The gradients 1 and -1 cancel; their squares do not.
    assert fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0, -1.0]), microbatch=2) == 1.0


def test_what_is_frozen_is_an_argument():
    loss = lambda w, x, scale: scale * w * x
    got = fisher(loss, jnp.float32(0.0), jnp.array([1.0, 2.0]), jnp.float32(3.0))
    assert got == pytest.approx((9 + 36) / 2)


def test_one_compilation_whatever_the_number_of_examples(monkeypatch):
    chex.clear_trace_counter()
    steps, real = [], per_example.add
    monkeypatch.setattr(per_example, "add", lambda *args, **options: steps.append(1) or real(*args, **options))
    loss = chex.assert_max_traces(lambda w, x: jnp.sum(w * x), n=1)
    fisher(loss, jnp.ones(2), jnp.ones((7, 2)), microbatch=3)
    assert len(steps) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("labels", ["expected", "sampled"])
def test_logits_of_any_precision(labels, dtype):
    with jax.enable_x64(dtype == "float64"):
        w, x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float32), jnp.ones((2, 3))
        logits = lambda w, row: (row.astype(w.dtype) @ w).astype(dtype)
        got = fisher(logits, w, x, labels=labels, key=jax.random.key(1))
        wide = fisher(lambda w, row: logits(w, row).astype(jnp.float32), w, x, labels=labels, key=jax.random.key(1))
        close_by_leaf(got, wide, tolerance=3e-2)


def test_leaves_in_half_precision():
    """Squares of bfloat16 gradients, added in float32."""
    w, x = jnp.ones((30, 20), jnp.bfloat16), jax.random.normal(jax.random.key(0), (5, 4, 30), jnp.bfloat16)
    loss = lambda w, row: jnp.tanh(row @ w).sum()
    got = fisher(loss, w, x)
    assert got.dtype == jnp.float32
    wanted = np.mean([np.asarray(jax.grad(loss)(w, row), np.float32) ** 2 for row in x], axis=0)
    close_by_leaf(got, wanted, tolerance=2e-2)


@pytest.mark.parametrize(
    ("fn", "labels", "message"),
    [
        (
            lambda w, x: w * x,
            "empirical",
            r"must return a scalar loss of one example as floats, got float32 \[2\]",
        ),
        (lambda w, x: jnp.sum(w * x).astype(int), "empirical", r"got int32 \[\]"),
        (lambda w, x: (jnp.sum(w * x), w), "empirical", "got tuple"),
        (lambda w, x: jnp.sum(w * x), "expected", r"must return logits \[num_labels\] .* got float32 \[\]"),
        (lambda w, x: (w * x)[None], "sampled", r"got float32 \[1, 2\]"),
    ],
)
def test_a_function_of_another_kind_is_refused(fn, labels, message):
    with pytest.raises(UserError, match=message):
        fisher(fn, jnp.ones(2), jnp.ones((3, 2)), labels=labels, key=jax.random.key(0))


def test_what_does_not_go_together_is_refused():
    loss, w = (lambda w, x: jnp.sum(w * x[0])), jnp.ones(2)
    with pytest.raises(UserError, match="one common leading axis"):
        fisher(loss, w, (jnp.ones((5, 2)), jnp.ones((4, 2))))
    with pytest.raises(UserError, match="one common leading axis"):
        fisher(loss, w, {})
    with pytest.raises(UserError, match="3 ids were given for 2 examples"):
        fisher(loss, w, (jnp.ones((2, 2)),), ids=[1, 2, 3])
    with pytest.raises(UserError, match=r"respect to \['n'\]: expected a float array, got int32"):
        fisher(loss, {"n": jnp.ones(2, int)}, (jnp.ones((2, 2)),))
    with pytest.raises(UserError, match="respect to the tree: expected a float array, got float"):
        fisher(loss, 1.0, (jnp.ones((2, 2)),))
    (all_five,) = accumulate(loss, w, (jnp.ones((5, 2)),))
    with pytest.raises(UserError, match="has 5 examples, but there are 4"):
        next(accumulate(loss, w, (jnp.ones((4, 2)),), start=all_five))


def test_any_pytree():
    tree = {"a": [jnp.ones(2)], "b": (jnp.ones(()),)}
    got = fisher(lambda t, x: x * t["a"][0].sum() + t["b"][0], tree, jnp.array([2.0]))
    chex.assert_trees_all_close(got, {"a": [jnp.full(2, 4.0)], "b": (jnp.ones(()),)})


@pytest.mark.parametrize(
    ("examples", "microbatch"),
    [(jnp.ones((0,)), None), (jnp.ones(2), 0), (jnp.ones(2), 2.5), (jnp.ones(2), float("nan"))],
)
def test_nothing_to_measure(examples, microbatch):
    with pytest.raises(UserError, match=r"needs examples, got none|microbatch must be a whole number of at least 1"):
        fisher(lambda w, x: w * x, jnp.ones(()), examples, microbatch=microbatch)


@pytest.mark.parametrize("limit", [-1, float("nan")])
def test_a_limit_below_zero(limit):
    with pytest.raises(UserError, match="memory_limit_bytes must be 0 or more"):
        fisher(lambda w, x: w * x, jnp.ones(()), jnp.ones(2), memory_limit_bytes=limit)


@pytest.mark.parametrize("labels", ["expected", "sampled"])
def test_logits_of_no_class(labels):
    with pytest.raises(UserError, match=r"fn must return logits \[num_labels\] .*, got float32 \[0\]"):
        fisher(lambda w, x: w * jnp.zeros(0), jnp.ones(()), jnp.ones(2), labels=labels, key=jax.random.key(0))


def test_a_gradient_that_is_not_finite_names_the_leaf():
    tree = {"good": jnp.ones(()), "bad": jnp.zeros(())}
    with pytest.raises(UserError, match=r"'bad'.*not finite"):
        fisher(lambda t, x: x * t["good"] + jnp.sqrt(t["bad"]), tree, jnp.ones(2))


@pytest.mark.parametrize("values", ["square", "absolute"])
def test_expected_fisher_equals_a_loop_over_classes(values):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(5, 4)))
        logits = lambda w, row: jnp.tanh(row @ w)
        wanted = np.zeros((4, 3))
        for row in x:
            p = np.exp(logits(w, row)) / np.exp(logits(w, row)).sum()
            for c in range(3):
                grad = np.asarray(
                    jax.grad(lambda w: jnp.log(jnp.exp(logits(w, row))[c] / jnp.exp(logits(w, row)).sum()))(w)
                )
                wanted += p[c] * (grad**2 if values == "square" else np.abs(grad)) / 5
        got = fisher(logits, w, x, labels="expected", values=values, microbatch=2)
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_expected_fisher_of_regression_is_that_of_a_normal_distribution():
    """By sampling targets from N(logit, 1/2) and squaring the gradient of the squared error."""
    w, x = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [0.3, -0.7]])
    logit = lambda w, row: jnp.sin(w @ row)[None]
    got = fisher(logit, w, x, labels="expected")
    noise = np.sqrt(0.5) * np.random.default_rng(0).normal(size=(100_000, 1))
    grads = [np.asarray(jax.grad(lambda w: logit(w, row)[0])(w)) for row in x]
    sampled = np.mean([np.mean((2 * noise * g) ** 2, axis=0) for g in grads], axis=0)
    np.testing.assert_allclose(got, sampled, rtol=0.02)


def test_absolute_values_are_averaged_too():
    assert fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0, -3.0]), values="absolute") == 2.0
    with pytest.raises(UserError, match="values 'cube' is unknown"):
        fisher(lambda w, x: w * x, jnp.float32(0.0), jnp.array([1.0]), values="cube")


@pytest.fixture(scope="module", params=["float32"])
def whole(toy, request):
    """All parameters of a BERT of one layer: (loss, logits, params, examples)."""
    model = Bert(BertConfig(**{**vars(toy.model.config), "num_hidden_layers": 1, "dtype": request.param}))

    def logits(params, example):
        ids, mask, _ = example
        return jpeft.apply(model, jpeft.chain(), {"params": params}, ids[None], mask[None], mask=mask[None])[0][0]

    def loss(params, example):
        return -jax.nn.log_softmax(logits(params, example))[example[2]]

    params = {**toy.params, "encoder": {"layer_0": toy.params["encoder"]["layer_0"]}}
    return loss, logits, params, (toy.ids, toy.mask, toy.labels)


@functools.cache
def of_one_example(loss, logits):
    """Log-probabilities, the gradient of one of them, and that of the loss; compiled once for all variants."""
    logs = jax.jit(lambda tree, example: jax.nn.log_softmax(logits(tree, example)))
    grad_of_class = jax.jit(jax.grad(lambda tree, example, c: jax.nn.log_softmax(logits(tree, example))[c]))
    return logs, grad_of_class, jax.jit(jax.grad(loss))


def definition(loss, logits, tree, examples, labels, values, key):
    """Each variant written out: a loop over examples and classes, with plain gradients of log-probabilities."""
    measure = {"square": np.square, "absolute": np.abs}[values]
    logs, grad_of_class, grad = of_one_example(loss, logits)
    n, total = len(examples[0]), jax.tree.map(lambda x: np.zeros(x.shape), tree)
    for i in range(n):
        example = jax.tree.map(lambda x, i=i: x[i], examples)
        log = logs(tree, example)
        drawn = int(jax.random.categorical(jax.random.fold_in(key, i), log))
        terms = {
            "empirical": lambda: [(1.0, grad(tree, example))],
            "expected": lambda: [(np.exp(log[c]), grad_of_class(tree, example, c)) for c in range(len(log))],
            "sampled": lambda: [(1.0, grad_of_class(tree, example, drawn))],
        }
        for weight, g in terms[labels]():
            total = jax.tree.map(lambda t, g, w=weight: t + w * measure(np.asarray(g)) / n, total, g)
    return total


@pytest.mark.parametrize("whole", ["float64"], indirect=True)
@pytest.mark.parametrize("values", ["square", "absolute"])
@pytest.mark.parametrize("labels", ["empirical", "expected", "sampled"])
def test_every_variant_equals_its_definition_over_all_parameters(whole, key, labels, values):
    with jax.enable_x64(True):
        loss, logits, *rest = whole
        params, examples = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x, rest)
        fn = loss if labels == "empirical" else logits
        got = fisher(fn, params, examples, labels=labels, values=values, key=key, microbatch=3)
        close_by_leaf(got, definition(loss, logits, params, examples, labels, values, key), tolerance=1e-9)


def test_all_parameters_in_single_precision(whole, key):
    loss, logits, params, examples = whole
    close_by_leaf(fisher(loss, params, examples), loop(jax.jit(loss), params, examples, 4))
    wanted = definition(loss, logits, params, examples, "expected", "square", key)
    close_by_leaf(fisher(logits, params, examples, labels="expected"), wanted)


def test_sampled_labels_are_those_of_the_key_whatever_the_microbatch(whole, key):
    _, logits, params, examples = whole
    of_head = lambda head, example: logits({**params, "classifier": head}, example)
    one, two, other = (
        fisher(of_head, params["classifier"], examples, labels="sampled", key=k, microbatch=size)
        for k, size in ((key, 1), (key, 3), (jax.random.key(5), 1))
    )
    close_by_leaf(two, one)
    assert np.abs(np.asarray(one["kernel"]) - np.asarray(other["kernel"])).max() > 1e-4
    with pytest.raises(UserError, match="pass `key`"):
        fisher(logits, params, examples, labels="sampled")


@pytest.fixture
def net():
    """A loss that ignores padding, its weights and padded examples: seconds, where a BERT takes a minute to compile."""
    w, x = jax.random.normal(jax.random.key(0), (6, 40)), jax.random.normal(jax.random.key(1), (4, 7, 6))
    mask = (jnp.arange(7)[None] < jnp.array([7, 4, 5, 6])[:, None]).astype(jnp.float32)
    return lambda w, example: (jnp.tanh(example[0] @ w).sum(1) * example[1]).sum(), w, (x, mask)


def test_groups_of_other_lengths(net):
    """Rows cut to their own lengths count as in one padded batch."""
    loss, params, (x, mask) = net
    cut = lambda rows, length: (x[rows, :length], mask[rows, :length])
    groups = [cut(slice(0, 1), 7), cut(slice(1, 3), 5), cut(slice(3, 4), 6)]
    close_by_leaf(fisher(loss, params, groups, grouped=True), fisher(loss, params, (x, mask)))


def test_a_sum_goes_on_where_it_stopped(net):
    loss, params, examples = net
    everything = fisher(loss, params, examples, microbatch=1)
    seen = []
    for running in accumulate(loss, params, examples, microbatch=1):
        seen.append(running.done)
        if running.done == 2:
            half = running._replace(parts=jax.tree.map(np.array, running.parts))
            break
    later = [running.done for running in accumulate(loss, params, examples, microbatch=1, start=half)]
    for last in accumulate(loss, params, examples, microbatch=1, start=half):
        end = last._replace(parts=jax.tree.map(np.array, last.parts))
    assert (seen, later) == ([1, 2], [3, 4])
    chex.assert_trees_all_equal(mean(end), jax.tree.map(np.asarray, everything))
    (again,) = accumulate(loss, params, examples, start=end)
    assert again is end


def test_memory_decides_how_many_at_a_time(net):
    loss, params, examples = net
    done = lambda **options: [r.done for r in accumulate(loss, params, examples, **options)]
    assert done() == [4]
    assert done(memory_limit_bytes=1) == [1, 2, 3, 4]
    assert done(memory_limit_bytes=10_000)[0] in (2, 3)
    assert done(microbatch=3) == [2, 4]  # two passes of two, not one of three and one of one


def test_nan_names_the_example_and_the_leaf():
    tree = {"good": jnp.ones((30, 20)), "bad": jnp.ones((30, 20))}
    x = jnp.ones((5, 4, 30)).at[3, 1, 2].set(jnp.nan)
    loss = lambda t, x: jnp.tanh(jnp.nan_to_num(x) @ t["good"]).sum() + jnp.tanh(x @ t["bad"]).sum()
    with pytest.raises(UserError, match=r"gradient of \['bad'\] is not finite at example 3"):
        fisher(loss, tree, x, microbatch=2)
    with pytest.raises(UserError, match="overflow"):
        fisher(lambda w, x: 1e30 * w * x, jnp.float32(1.0), jnp.ones(2))


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jpeft import fisher
from jpeft.importance.fisher import Running, accumulate, mean
assert jax.device_count() == 3
w, x = jax.random.normal(jax.random.key(0), (6, 40)), jax.random.normal(jax.random.key(1), (11, 5, 6))
logits = lambda w, x: jnp.tanh(x @ w).sum(0)[:4]
for labels, fn in (("empirical", lambda w, x: logits(w, x).sum()), ("expected", logits)):
    one = fisher(fn, w, x, labels=labels)
    for axes, shape in ((("data",), (3,)), (("a", "b"), (3, 1))):
        many = fisher(fn, w, x, labels=labels, mesh=jax.make_mesh(shape, axes), microbatch=2)
        np.testing.assert_allclose(many, one, rtol=1e-5)
shift = jax.device_put(jnp.ones(40), jax.devices()[1])  # of one device, and closed over
fn = lambda w, x: logits(w + shift, x).sum()
mesh = jax.make_mesh((3,), ("data",))
first = next(accumulate(fn, w, x, microbatch=1, mesh=mesh))
assert first.done == 3
*_, last = accumulate(fn, w, x, mesh=mesh, start=Running(3, jax.tree.map(np.asarray, first.total)))
np.testing.assert_allclose(mean(last), fisher(fn, jax.device_put(w, jax.devices()[1]), x), rtol=1e-5)
"""


def test_several_devices_give_what_one_does():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", DEVICES], check=True, env=environment)


@pytest.mark.parametrize("chosen", [None, "bfloat16"])
def test_products_are_in_full_precision_unless_the_user_chose(chosen):
    """What `fn` and the sums ask of an accelerator, where float32 products are TF32 or bfloat16 by default."""
    seen = set()

    def loss(w, x):
        seen.add(jax.config.jax_default_matmul_precision)
        return jnp.sum((x @ w) ** 2)

    with jax.default_matmul_precision(chosen):
        fisher(loss, jnp.ones((3, 2)), jnp.ones((4, 5, 3)))
    assert seen == {chosen or "highest"}


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap"])
def test_rows_of_a_table_that_does_not_have_them(mode):
    """Two rows beyond its end are one row where the look-up clips."""
    table = jax.random.normal(jax.random.key(0), (6, 3))
    ids = jnp.array([[7, 9, 1], [0, 6, 5], [2, 2, 3], [-8, -9, 0]])

    def loss(table, ids):
        return jnp.square(jnp.nan_to_num(jnp.take(table, ids, axis=0, mode=mode)).sum(0)).sum()

    close_by_leaf(fisher(loss, table, ids), loop(loss, table, ids, len(ids)))
