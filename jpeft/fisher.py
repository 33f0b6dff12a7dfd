"""The diagonal of the empirical Fisher information, one example at a time."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError

__all__ = ["fisher"]

Tree = TypeVar("Tree")


def fisher(loss: Callable[..., Array], tree: Tree, examples: Any, *rest: Any, microbatch: int | None = None) -> Tree:
    """Mean over examples of the squared gradient of each example's own loss, (1/n) sum_i (d loss_i / d tree)^2.

    With the loss -log p(y_i | x_i) at the true label this is the empirical Fisher information (Kirkpatrick et al. 2017,
    arXiv:1612.00796; Sung et al. 2021, arXiv:2111.09839). The gradients are taken by `vmap(grad)` over `microbatch`
    examples at a time and their squares accumulated, so memory holds `microbatch` gradients whatever n is. A mean of
    squares is not the square of a mean: gradients of different examples are never added before they are squared.

    Args:
      loss: (tree, example, *rest) -> scalar, without randomness. `example` is `examples` without its leading axis.
      tree: the pytree of float arrays to differentiate by.
      examples: a pytree of arrays with a common leading axis n.
      *rest: further arguments of `loss`, such as frozen parameters; handed to the compiled function as arguments, so
        that they are not baked into it as constants.
      microbatch: examples at a time. None means 1 on CPU, where batched small products are slower than one after the
        other, and 8 elsewhere.

    Returns:
      A pytree like `tree`, float32 (float64 where `tree` is).

    Raises:
      UserError: if there are no examples, `microbatch` is below 1, or a gradient is not finite.

    >>> import jax.numpy as jnp
    >>> fisher(lambda w, x: w * x, jnp.float32(2.0), jnp.array([1.0, 3.0])).item()  # (1 + 9) / 2
    5.0
    """
    n = len(jax.tree.leaves(examples)[0])
    size = min(n, microbatch if microbatch is not None else 1 if jax.default_backend() == "cpu" else 8)
    if n == 0 or size < 1:
        raise UserError(f"Fisher information needs examples and a microbatch of at least 1, got {n} and {microbatch}")

    @jax.jit
    def accumulate(total: Tree, tree: Tree, chunk: Any, weights: Array, rest: tuple) -> Tree:
        grads = jax.vmap(jax.grad(loss), (None, 0, *(None for _ in rest)))(tree, chunk, *rest)
        return jax.tree.map(
            lambda t, g: t + jnp.tensordot(weights.astype(t.dtype), jnp.square(g.astype(t.dtype)), 1), total, grads
        )

    total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)
    for chunk, weights in _chunks(examples, n, size):
        total = accumulate(total, tree, chunk, weights, rest)
    total = jax.tree.map(lambda t: t / n, total)
    for path, leaf in jax.tree_util.tree_leaves_with_path(total):
        if not bool(jnp.isfinite(leaf).all()):
            raise UserError(f"the gradient of {jax.tree_util.keystr(path)} is not finite: look for NaN or Inf")
    return total


def _chunks(examples: Any, n: int, size: int) -> Iterator[tuple[Any, Array]]:
    """Microbatches of one shape: the last one repeats example 0 with weight 0, so that nothing is compiled twice."""
    for start in range(0, n, size):
        index = jnp.arange(start, start + size)
        real = index < n
        index = jnp.where(real, index, 0)
        yield jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], examples), real.astype(jnp.float32)
