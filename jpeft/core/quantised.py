"""Quantised kernels: what lies in the place of a kernel among the parameters, and how it becomes dense again.

Values are quantised in the order of the kernel with its axes reversed, that is, of PyTorch's weight [out, in]: the
blocks of 4-bit codes run along the inputs of one output, and codes, scales and values are those of bitsandbytes
(Dettmers et al. 2023, arXiv:2305.14314; code books of bitsandbytes 0.50).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

__all__ = [
    "BLOCK",
    "BOOKS",
    "DYNAMIC",
    "KINDS",
    "NESTED",
    "Quantised",
    "dense",
    "holds_quantised",
    "is_quantised",
    "remade",
]

KINDS = ("nf4", "fp4", "int8")
BLOCK = 64  # values with one absmax, of the 4-bit kinds
NESTED = 256  # absmaxes with one scale of their own
HALF = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)  # the order of FP4's bits: sign, exponent, mantissa
BOOKS = {
    "nf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    "fp4": np.array([*HALF, *(-x for x in HALF)], np.float32),
}  # fmt: skip


def _dynamic() -> np.ndarray:
    """The signed 8-bit "dynamic" code book (arXiv:1511.04561): 2^i values a sign in the i-th of seven decades."""
    means = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
    positive = np.concatenate(means)
    return np.sort(np.concatenate([-positive, [0.0], positive, [1.0]])).astype(np.float32)


DYNAMIC = _dynamic()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind", "own_shape", "own_dtype")
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel in codes, a pytree of its own among the parameters, made by `jpeft.quantise`.

    `shape`, `ndim`, `size` and `dtype` are those of the kernel that it stands for. Where `nn.scan` or `nn.vmap` stacks
    kernels, each copy is quantised by itself, and all arrays have the leading axes of the stack.

    Attributes:
      codes: of 4-bit kinds uint8 [*stack, blocks * 32], two codes to a byte, the first one in the high bits; of int8
        int8 [*stack, entries].
      scales: of 4-bit kinds the absmax of each block in 8 bits, uint8 [*stack, blocks]; the absmaxes of groups of 256
        of these, float32 [*stack, groups]; and their mean, float32 [*stack], which was subtracted first. Of int8 the
        absmax of each output, float32 [*stack, out].
      kind: "nf4", "fp4" or "int8".
      own_shape: of one copy.
      own_dtype: of the dense kernel.
    """

    codes: Array
    scales: tuple[Array, ...]
    kind: str
    own_shape: tuple[int, ...]
    own_dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel, with the stack in front."""
        return (*self.codes.shape[:-1], *self.own_shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the dense kernel, with the stack."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of the kernel's entries, not of bytes."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the dense kernel."""
        return jnp.dtype(self.own_dtype)


def is_quantised(x: Any) -> bool:
    """Whether this is a quantised kernel: the `is_leaf` of functions over trees that may hold some."""
    return isinstance(x, Quantised)


def holds_quantised(tree: Any) -> bool:
    """Whether there is a quantised kernel in a tree."""
    return any(map(is_quantised, jax.tree.leaves(tree, is_leaf=is_quantised)))


def dense(tree: Any) -> Any:
    """The tree with every quantised kernel in it dequantised; the tree itself if there is none.

    What is computed from it and differentiated keeps the dense kernels for the backward pass; `remade` does not.
    """
    if not holds_quantised(tree):
        return tree
    return jax.tree.map(lambda x: _dense(x) if is_quantised(x) else x, tree, is_leaf=is_quantised)


def _dense(x: Quantised) -> Array:
    stack, axes = x.shape[: x.ndim - len(x.own_shape)], len(x.own_shape)
    values = _from_bytes(x) if x.kind == "int8" else _from_blocks(x)
    kernel = values.reshape(*stack, *x.own_shape[::-1])
    turned = (*range(len(stack)), *range(x.ndim - 1, x.ndim - axes - 1, -1))
    return kernel.transpose(turned).astype(x.dtype)


def _from_bytes(x: Quantised) -> Array:
    """[*stack, out, entries of an output]."""
    (absmax,) = x.scales
    codes = x.codes.reshape(*absmax.shape, -1).astype(jnp.float32)
    return codes * (absmax / 127)[..., None]


def _from_blocks(x: Quantised) -> Array:
    """[*stack, entries]."""
    absmax = _absmax(*x.scales)
    pairs = jnp.stack([x.codes >> 4, x.codes & 15], axis=-1)
    values = _look_up(BOOKS[x.kind], pairs.reshape(*absmax.shape, BLOCK)) * absmax[..., None]
    return values.reshape(*absmax.shape[:-1], -1)[..., : math.prod(x.own_shape)]


def _absmax(codes: Array, nested: Array, mean: Array) -> Array:
    """[*stack, blocks]. By broadcasting: an index into `nested` would be computed for every value of a kernel."""
    blocks = codes.shape[-1]
    surplus = NESTED * nested.shape[-1] - blocks
    padded = jnp.pad(codes, [*((0, 0) for _ in codes.shape[:-1]), (0, surplus)])
    scaled = _look_up(DYNAMIC, padded.reshape(*nested.shape, NESTED)) * nested[..., None]
    return scaled.reshape(*nested.shape[:-1], -1)[..., :blocks] + mean[..., None]


def _look_up(book: np.ndarray, codes: Array) -> Array:
    return jnp.asarray(book).at[codes].get(mode="promise_in_bounds")


def remade(fn: Callable[..., Any], quantised: Any, *args: Any) -> Any:
    """fn(quantised, *args), of which no dense kernel outlives the call: the backward pass makes them anew.

    `jax.checkpoint` is meant to do this. But XLA for CPU drops its barriers. It finds that both passes compute the
    same, computes it once, and first of all, since it depends on nothing: a step holds every dense kernel of a model at
    once. Here the codes depend, as far as a compiler can tell, on the arguments in the forward pass, and on the
    cotangent in the backward pass.

    Args:
      fn: (quantised, *args) -> a pytree of arrays. It must not close over what is differentiated.
      quantised: a pytree of quantised kernels, which have no gradient.
      *args: pytrees; what is no array is passed as it is.
    """
    leaves, treedef = jax.tree.flatten(args)
    traced = [isinstance(x, jax.Array | np.ndarray) for x in leaves]

    def plain(quantised: Any, arrays: list[Any]) -> Any:
        given = iter(arrays)
        filled = [next(given) if is_array else x for is_array, x in zip(traced, leaves, strict=True)]
        return fn(quantised, *jax.tree.unflatten(treedef, filled))

    def run(quantised: Any, arrays: list[Any]) -> Any:
        return plain(_after(arrays, quantised), arrays)

    def forward(quantised: Any, arrays: list[Any]) -> tuple[Any, Any]:
        return run(quantised, arrays), (quantised, arrays)

    def backward(kept: tuple[Any, list[Any]], cotangent: Any) -> tuple[None, list[Any]]:
        quantised, arrays = kept
        late = _after(cotangent, quantised)
        (of_arrays,) = jax.vjp(lambda arrays: plain(late, arrays), arrays)[1](cotangent)
        return None, of_arrays

    called = jax.custom_vjp(run)
    called.defvjp(forward, backward)
    return called(quantised, [x for is_array, x in zip(traced, leaves, strict=True) if is_array])


def _after(arrays: Any, quantised: Any) -> Any:
    """The same kernels, which cannot be made dense before these arrays are there."""
    never = jnp.zeros((), bool)
    for x in jax.tree.leaves(arrays):
        if jnp.issubdtype(x.dtype, jnp.number):
            first = x.reshape(-1)[:1]
            never |= ((first > 1) & (first < 0)).any()  # which is more than XLA knows
    return jax.tree.map(
        lambda x: dataclasses.replace(x, codes=x.codes ^ never.astype(x.codes.dtype)), quantised, is_leaf=is_quantised
    )
