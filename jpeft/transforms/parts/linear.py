"""Small helpers that several transforms share: layers as functions of leaves, initialisers, option checks."""

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.transform import Params

__all__ = [
    "LARGEST",
    "counts",
    "dropout",
    "kaiming_uniform",
    "layer_norm",
    "linear",
    "linear_leaves",
    "need_params",
    "positive",
    "rate",
    "sizes",
    "uniform_linear",
]


def linear(x: Array, leaves: dict[str, Array]) -> Array:
    """x @ kernel + bias in the dtype of x: [..., in] to [..., out]; the leaves stay float32 for any x."""
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


def uniform_linear(key: Array, n_in: int, n_out: int, fan: int | None = None) -> dict[str, Array]:
    """A linear layer initialised as in PyTorch: both from U(-1/sqrt(fan), 1/sqrt(fan)); fan is `n_in` by default."""
    kernel, bias = jax.random.split(key)
    bound = (fan or n_in) ** -0.5
    return {
        "kernel": jax.random.uniform(kernel, (n_in, n_out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (n_out,), minval=-bound, maxval=bound),
    }


def layer_norm(x: Array, leaves: dict[str, Array], epsilon: float) -> Array:
    """LayerNorm over the last axis with {"scale": [d], "bias": [d]}; statistics are at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    normed = (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)
    scale, bias = (leaves[name].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)) for name in ("scale", "bias"))
    return normed * scale + bias


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); no key means no dropout."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


LARGEST = 2**16  # wider than any encoder; what is larger is a slip, and would only run out of memory


def positive(**values: float) -> None:
    """Raises UserError naming the first value that is not a positive, finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{name} must be positive, got {value!r:.60}")


def counts(**values: int | None) -> None:
    """Raises UserError naming the first value that is not a positive integer; None passes."""
    for name, value in values.items():
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{name} must be an integer, got {value!r:.60}")
            positive(**{name: value})


def sizes(**values: int | None) -> None:
    """As `counts`, for widths of modules, which have a limit."""
    counts(**values)
    for name, value in values.items():
        if value is not None and value > LARGEST:
            raise UserError(f"{name} must be at most {LARGEST:,}, got {value}")


def rate(**values: float) -> None:
    """Raises UserError naming the first value that is not a dropout rate."""
    for name, value in values.items():
        if isinstance(value, str) or not 0 <= value < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {value!r}")


def need_params(params: Params | None, name: str) -> Params:
    """The parameters; raises a UserError that names the method if there are none."""
    if params is None:
        raise UserError(f"{name} starts from the model's parameters: pass `params` to init")
    return params
