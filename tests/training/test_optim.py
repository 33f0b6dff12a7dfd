import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.training import optim


def test_schedule_is_that_of_the_references():
    schedule = optim.warmup_linear(2.0, num_steps=10, warmup_ratio=0.25)
    warmup = math.ceil(2.5)
    wanted = [2.0 * (i / warmup if i < warmup else (10 - i) / (10 - warmup)) for i in range(11)]
    assert np.allclose([schedule(i) for i in range(11)], wanted, atol=1e-6)
    assert optim.warmup_linear(2.0, 4, 0.0)(0) == 2.0
    assert optim.warmup_linear(2.0, 1, 0.06)(0) == 2.0  # a single step trains


def by_hand(p, g, steps, rate, decay, clip):
    """AdamW as in the paper, in float64: clip, moments, bias correction, decoupled decay."""
    p, m, v = {k: np.float64(x) for k, x in p.items()}, 0, 0
    norm = np.sqrt(sum((np.float64(x) ** 2).sum() for x in g.values()))
    g = {k: np.float64(x) * min(1, clip / norm) for k, x in g.items()}
    m, v = (dict.fromkeys(p, 0.0) for _ in range(2))
    for t in range(1, steps + 1):
        for k in p:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * g[k] ** 2
            step = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            p[k] = p[k] - rate * (step + decay * p[k] * (p[k].ndim >= 2))
    return p


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_adamw_clips_and_decays_matrices_only(scale):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2), "gate": rng.normal(size=())}
    grads = {k: scale * rng.normal(size=np.shape(x)) for k, x in params.items()}
    optimizer = optim.adamw(optax.constant_schedule(0.1), weight_decay=0.5)
    now = {k: jnp.asarray(x, jnp.float32) for k, x in params.items()}
    state = optimizer.init(now)
    for _ in range(3):
        updates, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, now)
        now = optax.apply_updates(now, updates)
    wanted = by_hand(params, grads, 3, 0.1, 0.5, 1.0)
    for k in params:
        assert np.allclose(now[k], wanted[k], atol=2e-5), k


def test_the_rates_of_a_partition_scale_the_last_update():
    params = {"dense": {"kernel": jnp.ones((2, 2))}, "classifier": {"bias": jnp.ones(2)}}
    lora = jpeft.lora(1, targets="dense", learning_rate_ratio=3.0)
    leaves = {"lora_0": {"dense": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}}
    parts = jpeft.partition(lora, params, leaves, trains="classifier")
    optimizer = optax.chain(optax.sgd(0.5), parts.scale)
    updates, _ = optimizer.update(parts.trainable, optimizer.init(parts.trainable), parts.trainable)
    assert set(updates["params"]) == {"classifier"}
    own, head = updates["peft"]["lora_0"]["dense"], updates["params"]["classifier"]
    assert [float(x.ravel()[0]) for x in (own["a"], own["b"], head["bias"])] == [-0.5, -1.5, -0.5]


def test_adamw_has_the_rates_and_the_decay_of_a_partition():
    params = {"dense": {"kernel": jnp.ones((2, 2))}, "classifier": {"bias": jnp.ones(2)}}
    lora = jpeft.lora(1, targets="dense", learning_rate_ratio=3.0)
    leaves = {"lora_0": {"dense": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}}
    # A decays as a matrix would, B does not: only the partition knows.
    method = lora._replace(decay=lambda path, leaf: path[-1] == "a")
    parts = jpeft.partition(method, params, leaves, trains="classifier")
    optimizer = optim.adamw(optax.constant_schedule(0.1), 0.5, parts)
    grads = jax.tree.map(jnp.ones_like, parts.trainable)
    updates, _ = optimizer.update(grads, optimizer.init(parts.trainable), parts.trainable)
    own, head = updates["peft"]["lora_0"]["dense"], updates["params"]["classifier"]
    found = [float(np.ravel(x)[0]) for x in (own["a"], own["b"], head["bias"])]
    np.testing.assert_allclose(found, [-0.1 * (1 + 0.5), -0.3, -0.1], rtol=1e-4)
