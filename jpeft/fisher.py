"""The diagonal of the Fisher information, one example at a time."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import UserError, nearest

__all__ = ["expected_fisher", "fisher"]

Tree = TypeVar("Tree")
VALUES: dict[str, Callable[[Array], Array]] = {"square": jnp.square, "absolute": jnp.abs}


def fisher(
    loss: Callable[..., Array],
    tree: Tree,
    examples: Any,
    *rest: Any,
    values: str = "square",
    microbatch: int | None = None,
) -> Tree:
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
      values: "square" of the gradients, or their "absolute" value as in FISH mask's variant.
      microbatch: examples at a time. None means 1 on CPU, where batched small products are slower than one after the
        other, and 8 elsewhere.

    Returns:
      A pytree like `tree`, float32 (float64 where `tree` is).

    Raises:
      UserError: if there are no examples, `microbatch` is below 1, `values` is unknown, or a gradient is not finite.

    >>> import jax.numpy as jnp
    >>> fisher(lambda w, x: w * x, jnp.float32(2.0), jnp.array([1.0, 3.0])).item()  # (1 + 9) / 2
    5.0
    """
    measure = _measure(values)

    def one(tree: Tree, example: Any, *rest: Any) -> Tree:
        return jax.tree.map(measure, jax.grad(loss)(tree, example, *rest))

    return _mean(one, tree, examples, rest, microbatch)


def expected_fisher(
    logits: Callable[..., Array],
    tree: Tree,
    examples: Any,
    *rest: Any,
    values: str = "square",
    microbatch: int | None = None,
) -> Tree:
    """Fisher information over the model's own predictions, (1/n) sum_i sum_c p(c | x_i) (d log p(c | x_i) / d tree)^2.

    Exact in c: one forward pass an example and one backward pass a class; labels are not read. A single logit is the
    mean of a normal distribution of variance 1/2, the one whose -log p is the squared error, up to a constant; its
    information is 2 (d logit / d tree)^2.

    Args:
      logits: (tree, example, *rest) -> [c], without randomness.
      tree: as for `fisher`, and so are the other arguments.
      examples: as for `fisher`.
      *rest: as for `fisher`.
      values: as for `fisher`.
      microbatch: as for `fisher`.

    Returns:
      A pytree like `tree`, float32 (float64 where `tree` is).

    Raises:
      UserError: as `fisher`.
    """
    measure = _measure(values)

    def one(tree: Tree, example: Any, *rest: Any) -> Tree:
        out, backward = jax.vjp(lambda t: logits(t, example, *rest), tree)
        if out.shape == (1,):
            (grads,) = backward(jnp.full_like(out, 2**0.5))
            return jax.tree.map(measure, grads)
        probabilities, to_logits = jax.nn.softmax(out), jnp.eye(out.size, dtype=out.dtype) - jax.nn.softmax(out)[None]

        def add(total: Tree, c: tuple[Array, Array]) -> tuple[Tree, None]:
            probability, cotangent = c
            (grads,) = backward(cotangent)
            return jax.tree.map(lambda t, g: t + probability.astype(t.dtype) * measure(g), total, grads), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, tree), (probabilities, to_logits))[0]

    return _mean(one, tree, examples, rest, microbatch)


def _measure(values: str) -> Callable[[Array], Array]:
    """The function that is applied to gradients, in float32 at least."""
    if values not in VALUES:
        raise UserError(f"values {values!r} is unknown: {nearest(values, VALUES)}")
    return lambda g: VALUES[values](g.astype(jnp.promote_types(g.dtype, jnp.float32)))


def _mean(one: Callable[..., Tree], tree: Tree, examples: Any, rest: tuple, microbatch: int | None) -> Tree:
    """The mean of one(tree, example, *rest) over examples, by microbatches."""
    n = len(jax.tree.leaves(examples)[0])
    size = min(n, microbatch if microbatch is not None else 1 if jax.default_backend() == "cpu" else 8)
    if n == 0 or size < 1:
        raise UserError(f"Fisher information needs examples and a microbatch of at least 1, got {n} and {microbatch}")

    @jax.jit
    def accumulate(total: Tree, tree: Tree, chunk: Any, weights: Array, rest: tuple) -> Tree:
        each = jax.vmap(one, (None, 0, *(None for _ in rest)))(tree, chunk, *rest)
        return jax.tree.map(lambda t, x: t + jnp.tensordot(weights.astype(t.dtype), x.astype(t.dtype), 1), total, each)

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
