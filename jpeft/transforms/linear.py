"""Small pieces that several transforms share: a linear map on leaves, and the initialisations of the references."""

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError

__all__ = ["dropout", "kaiming_uniform", "linear", "linear_leaves", "positive", "rate", "sizes"]


def linear(x: Array, leaves: dict[str, Array]) -> Array:
    """x @ kernel + bias in the dtype of x: [..., in] to [..., out]; the leaves stay float32 whatever x is."""
    y = x @ leaves["kernel"].astype(x.dtype)
    bias = leaves["bias"].astype(x.dtype)
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def linear_leaves(kernel: Array) -> dict[str, Array]:
    """{"kernel": [in, out], "bias": zeros [out]}."""
    return {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1], kernel.dtype)}


def kaiming_uniform(key: Array, shape: tuple[int, int]) -> Array:
    """PyTorch's kaiming_uniform with a = sqrt(5) for an [in, out] kernel: U(-1/sqrt(in), 1/sqrt(in))."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def positive(**values: float) -> None:
    """Raises UserError for the first value that is not above zero, by its name."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value}")


def sizes(**values: int | None) -> None:
    """Raises UserError for the first value that is no positive whole number, by its name; None passes."""
    for name, value in values.items():
        if value is not None:
            if not isinstance(value, int):
                raise UserError(f"{name} must be a whole number, got {value!r}")
            positive(**{name: value})


def rate(**values: float) -> None:
    """Raises UserError for the first value that is no dropout rate, by its name."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {value}")
