import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core import tree
from jpeft.data.batching import Batch
from jpeft.data.kinds import IGNORED, KINDS
from jpeft.data.task import example_losses
from jpeft.models import Bert, BertConfig
from jpeft.training import optim
from jpeft.training import step as stepping

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16,
}  # fmt: skip
METHOD = jpeft.chain(jpeft.lora(rank=2), jpeft.prefix(3, mlp_hidden=8))


def batch(size=6, seed=0, regression=False):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 20, (size, 8), dtype=np.int32)
    mask = (np.arange(8) < rng.integers(3, 9, (size, 1))).astype(np.int32)
    labels = rng.normal(size=size).astype(np.float32) if regression else rng.integers(0, 3, size, dtype=np.int32)
    return Batch(ids, mask, np.zeros_like(ids), labels, np.ones(size, np.float32))


def head(path):
    return path[0] == "classifier"


@functools.cache
def setup(method=METHOD, trains=head, dropout=0.1, num_labels=3):
    """(model, trainable, frozen) of a tiny BERT."""
    config = BertConfig(**SHAPE, num_labels=num_labels, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)
    model = Bert(config)
    x = jnp.ones((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    trained, frozen = tree.split(params, trains)
    leaves = jpeft.init(method, jax.random.key(1), jpeft.sites(model, x), params)
    return model, {"params": trained, "peft": leaves}, {"params": frozen}


OPTIMIZER = optim.adamw(optax.constant_schedule(1e-2), 0.1)


@pytest.fixture
def optimizer():
    return OPTIMIZER


@functools.cache
def stepped(dropout):
    """The compiled step of the model that `setup` makes, for all tests; it leaves the state's buffers alone."""
    return jax.jit(stepping.train_step(setup(dropout=dropout)[0], METHOD, OPTIMIZER))


def test_only_the_trainable_changes_and_all_of_it(key, optimizer):
    _, trainable, frozen = setup()
    before = jax.tree.map(np.array, frozen)
    step = stepped(0.1)
    state = stepping.init_state(trainable, optimizer)
    for _ in range(3):  # B starts at 0, so A has no gradient in the first step
        state, _ = step(state, frozen, batch(), key)
    assert int(state.step) == 3
    chex.assert_trees_all_equal_shapes_and_dtypes(state.trainable, trainable)
    for path, now in tree.flatten(state.trainable).items():
        assert not np.array_equal(now, tree.flatten(trainable)[path]), path
    chex.assert_trees_all_equal(frozen, before)


def test_the_optimiser_holds_nothing_of_the_frozen(optimizer):
    _, trainable, frozen = setup()
    held = tree.count(stepping.init_state(trainable, optimizer).opt_state)
    assert 2 * tree.count(trainable) <= held <= 2 * tree.count(trainable) + 4
    assert tree.count(frozen) > tree.count(trainable)


def test_metrics_are_the_loss_before_the_step_and_its_gradient(key, optimizer):
    model, trainable, frozen = setup(dropout=0.0)

    def loss(trainable):
        params = tree.union(frozen["params"], trainable["params"])
        b = batch()
        logits, _ = jpeft.apply(
            model, METHOD, {"params": params, "peft": trainable["peft"]}, b.input_ids, b.attention_mask,
            b.token_type_ids, mask=b.attention_mask,
        )  # fmt: skip
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(6), b.labels])

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    step = stepped(0.0)
    _, metrics = step(stepping.init_state(trainable, optimizer), frozen, batch(), key)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)


def test_regression_is_the_mean_squared_error(key, optimizer):
    model, trainable, frozen = setup(dropout=0.0, num_labels=1)
    b = batch(regression=True)
    predicted = np.asarray(jax.jit(stepping.eval_step(model, METHOD))(trainable, frozen, b))[:, 0]
    state = stepping.init_state(trainable, optimizer)
    _, metrics = jax.jit(stepping.train_step(model, METHOD, optimizer))(state, frozen, b, key)
    np.testing.assert_allclose(metrics.loss, np.mean((predicted - b.labels) ** 2), rtol=1e-5)


def test_example_losses_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    np.testing.assert_allclose(example_losses(logits, jnp.array([0, 1])), [-np.log(0.5), -np.log(0.2)], rtol=1e-6)
    np.testing.assert_allclose(
        example_losses(jnp.array([[1.0], [-2.0]]), jnp.array([3.0, -2.0])), [4.0, 0.0], rtol=1e-6
    )


def test_rows_of_weight_0_do_not_matter(key, optimizer):
    _, trainable, frozen = setup(dropout=0.0)
    step = stepped(0.0)
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    first, other = batch(seed=0)._replace(weights=weights), batch(seed=1)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:4], b[4:]]), first, other)._replace(weights=weights)
    short = jax.tree.map(lambda a: a[:4], first)
    results = [step(stepping.init_state(trainable, optimizer), frozen, b, key) for b in (first, mixed, short)]
    chex.assert_trees_all_equal(results[0], results[1])
    chex.assert_trees_all_close(results[0], results[2], rtol=1e-3, atol=1e-5)
    full = step(stepping.init_state(trainable, optimizer), frozen, batch(), key)
    assert abs(float(full[1].loss - results[0][1].loss)) > 1e-4


def test_a_batch_in_parts_is_the_same_step(key, optimizer):
    """Of different sizes, padded to different lengths, and with rows that do not count."""
    _, trainable, frozen = setup(dropout=0.0)
    step = stepped(0.0)
    b = batch(seed=3)._replace(weights=np.array([1, 1, 0, 1, 1, 1], np.float32))
    order = np.argsort(b.attention_mask.sum(1))
    b = jax.tree.map(lambda x: x[order], b)
    short = b.attention_mask[:4].sum(1).max()
    parts = (
        jax.tree.map(lambda x: x[:4, :short] if x.ndim == 2 else x[:4], b),
        jax.tree.map(lambda x: x[4:], b),
    )
    assert short < 8
    whole, divided = (step(stepping.init_state(trainable, optimizer), frozen, each, key) for each in (b, parts))
    chex.assert_trees_all_close(whole, divided, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(whole[1], divided[1], rtol=1e-5)


def test_parts_of_a_batch_have_dropout_of_their_own(key, optimizer):
    _, trainable, frozen = setup(dropout=0.3)
    step = stepped(0.3)
    state = stepping.init_state(trainable, optimizer)
    half = batch()
    once, twice = (step(state, frozen, each, key)[1].loss for each in (half, (half, half)))
    assert abs(float(once - twice)) > 1e-4


def test_the_dropout_key_is_folded_with_the_step(key, optimizer):
    model, trainable, frozen = setup(dropout=0.3)
    step = stepped(0.3)
    state = stepping.init_state(trainable, optimizer)

    def loss(number, key):
        return float(step(state._replace(step=jnp.int32(number)), frozen, batch(), key)[1].loss)

    assert loss(0, key) == loss(0, key)
    assert loss(0, key) != loss(1, key)
    assert loss(0, key) != loss(0, jax.random.key(1))
    forward = jax.jit(lambda *args: stepping.forward(model, METHOD, *args))
    by_hand = forward(trainable, frozen, batch(), jax.random.fold_in(jax.random.fold_in(key, 5), 0))
    by_hand = jnp.mean(example_losses(by_hand, batch().labels))
    np.testing.assert_allclose(loss(5, key), by_hand, rtol=1e-5)


def test_evaluation_has_no_dropout():
    model, trainable, frozen = setup(dropout=0.5)
    evaluate = jax.jit(stepping.eval_step(model, METHOD))
    logits = evaluate(trainable, frozen, batch())
    chex.assert_shape(logits, (6, 3))
    chex.assert_trees_all_equal(logits, evaluate(trainable, frozen, batch()))
    same, _, _ = setup(dropout=0.0)
    chex.assert_trees_all_equal(logits, jax.jit(stepping.eval_step(same, METHOD))(trainable, frozen, batch()))


def test_full_fine_tuning_is_plain_optax(key, optimizer):
    nothing = jpeft.chain()
    model, trainable, frozen = setup(nothing, trains=lambda path: True, dropout=0.0)
    assert frozen == {"params": {}}
    assert trainable["peft"] == {}
    params, opt_state = trainable["params"], optimizer.init(trainable["params"])
    state = stepping.init_state(trainable, optimizer)
    step = jax.jit(stepping.train_step(model, nothing, optimizer))

    @jax.jit
    def plain(params, opt_state, b):
        def loss(params):
            logits, _ = model.apply({"params": params}, b.input_ids, b.attention_mask, b.token_type_ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, b.labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for seed in range(3):
        state, metrics = step(state, frozen, batch(seed=seed), key)
        params, opt_state, value = plain(params, opt_state, batch(seed=seed))
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-4)
    # Adam divides by the gradient's size, so where a gradient is all rounding (key biases) the steps may differ.
    name = ("encoder", "layer_0", "ffn", "intermediate", "kernel")
    np.testing.assert_allclose(
        tree.flatten(state.trainable["params"])[name], tree.flatten(params)[name], rtol=1e-3, atol=1e-4
    )


def test_steps_of_one_shape_are_traced_once(key, optimizer):
    model, trainable, frozen = setup()
    step = jax.jit(chex.assert_max_traces(stepping.train_step(model, METHOD, optimizer), n=1))
    state = stepping.init_state(trainable, optimizer)
    for seed in range(3):
        state, _ = step(state, frozen, batch(seed=seed), jax.random.fold_in(key, seed))
    assert int(state.step) == 3
    with pytest.raises(AssertionError):
        step(state, frozen, batch(size=4), key)


def test_a_few_steps_cut_the_loss(key, optimizer):
    _, trainable, frozen = setup()
    step = stepped(0.1)
    state = stepping.init_state(trainable, optimizer)
    losses = []
    for _ in range(80):
        state, metrics = step(state, frozen, batch(), key)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_single_loss_is_the_loss_of_one_row(key):
    model, trainable, frozen = setup()
    b = batch()
    expected = example_losses(jax.jit(stepping.eval_step(model, METHOD))(trainable, frozen, b), b.labels)
    single = jax.jit(stepping.single_loss(model, METHOD))
    for i in range(2):
        row = jax.tree.map(lambda x, i=i: x[i], b)
        got = single(trainable, row, frozen)
        np.testing.assert_allclose(got, expected[i], rtol=1e-5)


def test_a_penalty_is_added_to_the_loss_of_each_example(key, optimizer):
    """With the logits of another pass, whose dropout is another; its gradient counts, and it is off in evaluation."""
    model, trainable, frozen = setup()
    seen = []

    def penalty(logits, again):
        seen.append(1)
        return 100 * ((logits - again()) ** 2).sum(1)

    bare = jpeft.chain(*(member._replace(penalty=None) for member in METHOD.members))
    method = jpeft.chain(METHOD.members[0]._replace(penalty=penalty), METHOD.members[1])
    data, at = (
        batch()._replace(weights=np.array([1, 1, 1, 0, 1, 1], np.float32)),
        jax.random.fold_in(jax.random.fold_in(key, 0), 0),
    )

    def loss(trainable):
        one, two = (stepping.forward(model, bare, trainable, frozen, data, k) for k in (at, jax.random.fold_in(at, 1)))
        each = -jax.nn.log_softmax(one)[np.arange(6), data.labels] + 100 * ((one - two) ** 2).sum(1)
        return (each * data.weights).sum() / 5

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
    _, metrics = jax.jit(stepping.train_step(model, method, optimizer))(
        stepping.init_state(trainable, optimizer), frozen, data, key
    )
    assert seen
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-4)
    _, plain = stepped(0.1)(stepping.init_state(trainable, optimizer), frozen, data, key)
    assert float(metrics.loss) > float(plain.loss) + 1e-3


def test_a_penalty_at_every_token_counts_where_there_are_words(key, optimizer):
    """As a mean over the words of a row, like the loss: a constant adds itself."""
    model, trainable, frozen = setup(dropout=0.0)
    model = Bert(dataclasses.replace(model.config, by_token=True))
    data = batch()
    labels = np.full(data.input_ids.shape, IGNORED, np.int32)
    labels[:, 1], labels[::2, 2] = 1, 2
    found = []
    for penalty in (None, lambda logits, again: jnp.full(logits.shape[:-1], 3.0)):
        method = jpeft.chain(METHOD.members[0]._replace(penalty=penalty), METHOD.members[1])
        step = jax.jit(stepping.train_step(model, method, optimizer, KINDS["tagging"].loss))
        state = stepping.init_state(trainable, optimizer)
        found.append(step(state, frozen, data._replace(labels=labels), key)[1].loss)
    np.testing.assert_allclose(found[1] - found[0], 3.0, rtol=1e-5)
