import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.training.draws import dropout_key

KEYS = dropout_key(jax.random.split(jax.random.key(5), 200))


def masks(rate=0.1, shape=(16, 8, 96)):
    return np.stack([jax.random.bernoulli(key, rate, shape) for key in KEYS]).reshape(len(KEYS), -1)


def test_entries_are_kept_at_the_rate_and_as_unequally_as_chance_has_it():
    """The share of each mask is off by standard errors that are themselves normal: not more, and not less."""
    for rate in (0.1, 0.5, 0.9):
        drawn = masks(rate)
        errors = (drawn.mean(1) - rate) / np.sqrt(rate * (1 - rate) / drawn.shape[1])
        assert abs(errors.mean()) < 4 / np.sqrt(len(KEYS))
        assert 0.8 < errors.std() < 1.2
        assert abs(errors).max() < 4.5


def test_neighbours_and_masks_of_other_keys_are_not_alike():
    """Correlations between an entry and those of its row, the next rows, and the same entry under the next key."""
    centred = masks().astype(np.float64) - 0.1
    pairs = [(centred[:, :-lag] * centred[:, lag:]).mean(1) for lag in (1, 2, 3, 8, 96, 97, 768)]
    pairs.append((centred[:-1] * centred[1:]).mean(1))
    errors = np.concatenate(pairs) / 0.09 * np.sqrt(centred.shape[1])
    assert 0.9 < errors.std() < 1.1
    assert abs(errors).max() < 5


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_every_bit_is_set_half_of_the_time(width):
    with jax.enable_x64(True):
        words = jax.random.bits(KEYS[0], (4096,), f"uint{width}")
        bits = (np.asarray(words)[:, None] >> np.arange(width, dtype=words.dtype)) & 1
    assert words.dtype == f"uint{width}"
    np.testing.assert_allclose(bits.mean(0), 0.5, atol=4.5 / np.sqrt(4 * 4096))
    together = np.corrcoef(bits.T) - np.eye(width)
    assert abs(together).max() < 5 / np.sqrt(4096)


def test_draws_are_the_same_under_jit_and_vmap():
    def draw(key):
        return jax.random.uniform(key, (3, 5))

    one = np.stack([draw(key) for key in KEYS[:4]])
    np.testing.assert_array_equal(jax.vmap(draw)(KEYS[:4]), one)
    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(KEYS[:4]), one)


def test_a_key_splits_and_folds_as_its_original():
    key = jax.random.key(9)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(jax.random.fold_in(jpeft.dropout_key(key), 3)), data(jax.random.fold_in(key, 3)))
    np.testing.assert_array_equal(data(jax.random.split(jpeft.dropout_key(key))), data(jax.random.split(key)))


def test_a_scalar_and_nothing_can_be_drawn():
    assert jax.random.bits(KEYS[0]).shape == ()
    assert jax.random.bits(KEYS[0], (0, 3)).shape == (0, 3)
    assert jnp.unique(jax.random.bits(dropout_key(jax.random.key(0)), (1000,))).size == 1000


@pytest.mark.parametrize("other", [(7, 2), (1, 7)])
def test_both_words_of_a_key_and_their_order_count(other):
    """Nor is one mask another, some places further on."""
    words = [jax.random.wrap_key_data(np.array(data, np.uint32)) for data in ((7, 1), other)]
    one, two = (np.asarray(jax.random.bernoulli(dropout_key(key), 0.1, (100_000,))) - 0.1 for key in words)
    for lag in range(-3, 4):
        together = (one[3:-3] * np.roll(two, lag)[3:-3]).mean() / 0.09 * np.sqrt(one.size)
        assert abs(together) < 4.5
