"""The diagonal of the Fisher information, from per-example gradients."""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.core.errors import UserError, nearest
from jpeft.importance import per_example

__all__ = ["LABELS", "VALUES", "Running", "accumulate", "fisher", "mean"]

Tree = TypeVar("Tree")
LABELS = ("empirical", "expected", "sampled")
VALUES: dict[str, Callable[[Array], Array]] = {
    "square": jnp.square,
    "absolute": jnp.abs,
    "moments": lambda gradient: jnp.stack([gradient, jnp.square(gradient)]),
}
SHARE = 0.25  # of the device's memory, for the temporaries of single examples
MOST = {"cpu": 8}  # examples at a time; larger products are not faster there
MOST_ELSEWHERE = 64


class Running(NamedTuple, Generic[Tree]):
    """A sum over some of the examples.

    Attributes:
      done: the number of examples summed so far.
      parts: like the tree; with a leading axis over devices if `sharded`.
      sharded: whether each of several devices holds a part.
    """

    done: int
    parts: Tree
    sharded: bool = False

    @property
    def total(self) -> Tree:
        """The sum over the examples so far, like the tree."""
        return jax.tree.map(lambda x: x.sum(0), self.parts) if self.sharded else self.parts


def fisher(
    fn: Callable[..., Array],
    tree: Tree,
    examples: Any,
    *rest: Any,
    labels: str = "empirical",
    values: str = "square",
    key: Array | None = None,
    ids: Sequence[int] | None = None,
    microbatch: int | None = None,
    memory_limit_bytes: int | None = None,
    mesh: Mesh | None = None,
    grouped: bool = False,
) -> Tree:
    """The mean over examples of the squared gradient of each example's own log-likelihood.

    - "empirical": (1/n) sum_i (d loss_i / d tree)^2 with fn the loss -log p(y_i | x_i) at the true label (Kirkpatrick
      et al. 2017, arXiv:1612.00796; Sung et al. 2021, arXiv:2111.09839).
    - "expected": (1/n) sum_i sum_c p(c | x_i) (d log p(c | x_i) / d tree)^2 with fn the logits. Exact in c, with one
      forward pass per example and one backward pass per class.
    - "sampled": like "expected", with one class per example sampled from p(c | x_i) in place of the sum.

    A single logit is the mean of a normal distribution of variance 1/2, whose -log p is the squared error up to a
    constant; its information is 2 (d logit / d tree)^2. Only "empirical" reads the labels.

    A mean of squares is not the square of a mean: gradients of different examples are never added before they are
    squared. `jpeft.importance.per_example` explains how this costs about as much as a plain gradient.

    Float32 matrix products, in `fn` and in the sums, are computed in full float32 precision on every device,
    unless `fn` or JAX's configuration (`jax_default_matmul_precision`) asks for a different one.

    Args:
      fn: (tree, example, *rest) -> scalar loss, or logits [c]; deterministic. `example` is `examples` without its
        leading axis.
      tree: the pytree of float arrays to differentiate with respect to.
      examples: a pytree of arrays with a common leading axis n. If `grouped`, a sequence of such pytrees.
      *rest: further arguments of `fn`, such as frozen parameters; passed to the compiled function as arguments, so that
        they do not become constants in it.
      labels: "empirical", "expected" or "sampled".
      values: "square" of the gradients, their "absolute" value as in FISH mask's variant, or "moments": the gradients
        themselves and their squares, at the cost of one of them.
      key: for "sampled": the number of each example is folded into it.
      ids: the numbers of the n examples, for sampling and messages. None means 0 to n - 1 in the order given.
      microbatch: examples at a time on each device. None means as many as `memory_limit_bytes` allows, at most 8 on CPU
        and 64 elsewhere.
      memory_limit_bytes: limit on the temporaries of single examples, not counting `tree`, `rest` and the result. None
        means a quarter of the device's memory. At least one example is always processed.
      mesh: devices to split the examples over, along all axes of the mesh. None means one device.
      grouped: whether `examples` is a sequence of pytrees whose other axes may differ from one to the next, such as
        batches of different lengths.

    Returns:
      A pytree like `tree`, float32 (float64 where `tree` is). With "moments", the leaves have a leading axis of size 2:
      the mean gradient and the mean square.

    Raises:
      UserError: if there are no examples or their shapes do not match, an option is unknown, `fn` does not return what
        `labels` needs, or a gradient is not finite: it names the example, by its number in `ids`, and the leaf.

    >>> import jax.numpy as jnp
    >>> fisher(lambda w, x: w * x, jnp.float32(2.0), jnp.array([1.0, 3.0])).item()  # (1 + 9) / 2
    5.0
    """
    sums = accumulate(
        fn, tree, examples, *rest, labels=labels, values=values, key=key, ids=ids, microbatch=microbatch,
        memory_limit_bytes=memory_limit_bytes, mesh=mesh, grouped=grouped,
    )  # fmt: skip
    (last,) = deque(sums, maxlen=1)
    return mean(last)


def mean(complete: Running[Tree]) -> Tree:
    """The Fisher information from the last of the running sums.

    Raises:
      UserError: if it is not finite.
    """
    total, finite = _mean(complete.parts, complete.done, complete.sharded)
    for path, leaf in jax.tree_util.tree_leaves_with_path(finite):
        if not leaf:
            raise UserError(f"the information of {_name(path)} is not finite: the squared gradients overflow")
    return total


@functools.partial(jax.jit, static_argnames="sharded")
def _mean(parts: Any, done: Any, sharded: bool) -> tuple[Any, Any]:
    total = jax.tree.map(lambda x: (x.sum(0) if sharded else x) / jnp.asarray(done, x.dtype), parts)
    return total, jax.tree.map(lambda x: jnp.isfinite(x).all(), total)


def accumulate(
    fn: Callable[..., Array],
    tree: Tree,
    examples: Any,
    *rest: Any,
    labels: str = "empirical",
    values: str = "square",
    key: Array | None = None,
    ids: Sequence[int] | None = None,
    microbatch: int | None = None,
    memory_limit_bytes: int | None = None,
    mesh: Mesh | None = None,
    grouped: bool = False,
    start: Running[Tree] | None = None,
) -> Iterator[Running[Tree]]:
    """The running sums of `fisher`, one after each microbatch, to show progress or to save and resume.

    Args:
      fn: as in `fisher`.
      tree: as in `fisher`.
      examples: as in `fisher`.
      *rest: as in `fisher`.
      labels: as in `fisher`.
      values: as in `fisher`.
      key: as in `fisher`.
      ids: as in `fisher`.
      microbatch: as in `fisher`.
      memory_limit_bytes: as in `fisher`.
      mesh: as in `fisher`.
      grouped: as in `fisher`.
      start: an earlier sum over the first `start.done` of the same examples, not sharded, to resume from.

    Yields:
      The sum so far. Its arrays are donated when the next one is requested.

    Raises:
      UserError: as `fisher`.
    """
    groups = list(examples) if grouped else [examples]
    counts = [_count(group) for group in groups]
    n, devices = sum(counts), 1 if mesh is None else mesh.size
    mesh = None if mesh is None else Mesh(mesh.devices, mesh.axis_names)  # axes whose sharding XLA works out
    done = 0 if start is None else start.done
    _check(n, tree, labels, values, key, ids, microbatch, memory_limit_bytes, done)
    lead = (2,) if values == "moments" else ()
    total = jax.tree.map(
        lambda x: jnp.asarray(np.zeros((*lead, *x.shape), jnp.promote_types(x.dtype, jnp.float32))), tree
    )
    if start is not None:
        total = jax.tree.map(jnp.array, start.total)
    if mesh is not None:
        over, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((mesh.axis_names,), ()))
        total = jax.tree.map(lambda x: jnp.zeros((devices, *x.shape), x.dtype).at[0].set(x), total)
        total, tree, rest = jax.device_put(total, over), jax.device_put(tree, copied), jax.device_put(rest, copied)
    one = _one(fn, labels, jax.random.key(0) if key is None else key)
    first, unchecked = 0, None
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    compiled: dict[Any, tuple[Callable, int, list[Any]]] = {}
    for group, count in zip(groups, counts, strict=True):
        offset, first = first, first + count
        left = np.arange(max(offset, done), first)
        if not left.size:
            continue
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), group)
        static = jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes))
        if static not in compiled:
            step, most, constants = _compiled(
                one, fn, tree, shapes, rest, labels, VALUES[values], microbatch, memory_limit_bytes, mesh
            )
            compiled[static] = step, most, constants if mesh is None else jax.device_put(constants, copied)
        step, most, constants = compiled[static]
        share = math.ceil(left.size / devices)
        size = devices * math.ceil(share / math.ceil(share / most))  # even microbatches, so that padding is small
        for rows in (left[i : i + size] for i in range(0, left.size, size)):
            # The last microbatch is padded with a row of weight 0, so that a group is compiled once.
            filled = np.concatenate([rows, np.full(size - rows.size, rows[0])])
            chunk = jax.tree.map(lambda x, at=filled - offset: jnp.asarray(np.asarray(x)[at]), group)
            weights = jnp.asarray(np.arange(size) < rows.size, jnp.float32)
            numbered = (chunk, jnp.asarray(numbers[filled], jnp.int32))
            if mesh is not None:
                numbered, weights = jax.device_put((numbered, weights), over)
            total, finite = step(total, tree, numbered, weights, rest, constants)
            if unchecked is not None:  # the previous one, so as not to wait for the device
                _check_finite(*unchecked, one, tree, rest)
            unchecked = finite, numbers[rows], chunk
            done += rows.size
            if done == n:
                _check_finite(*unchecked, one, tree, rest)
            yield Running(done, total, mesh is not None)
    if start is not None and start.done == n:
        yield start


def _count(group: Any) -> int:
    """The number of examples in a group."""
    shapes = {jnp.shape(x) for x in jax.tree.leaves(group)}
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise UserError(f"examples must be arrays with one common leading axis, got {sorted(shapes) or 'none'}")
    return next(iter(shapes))[0]


def _check(
    n: int, tree: Any, labels: str, values: str, key: Array | None, ids: Sequence[int] | None, microbatch: int | None,
    limit: int | None, done: int,
) -> None:  # fmt: skip
    if n == 0:
        raise UserError("Fisher information needs examples, got none")
    if microbatch is not None and (microbatch < 1 or microbatch % 1):
        raise UserError(f"microbatch must be a whole number of at least 1, got {microbatch}")
    if limit is not None and not limit >= 0:
        raise UserError(f"memory_limit_bytes must be 0 or more, got {limit}")
    for name, value, known in (("labels", labels, LABELS), ("values", values, VALUES)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown: {nearest(str(value), known)}")
    if labels == "sampled" and key is None:
        raise UserError("labels 'sampled' need a PRNG key: pass `key`")
    if ids is not None and len(ids) != n:
        raise UserError(f"{len(ids)} ids were given for {n} examples: expected one per example")
    if done > n:
        raise UserError(f"the sum to resume from has {done} examples, but there are {n}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = getattr(leaf, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.floating):
            raise UserError(
                f"cannot differentiate with respect to {_name(path)}: expected a float array, got "
                f"{kind or type(leaf).__name__}"
            )


def _check_output(out: Any, labels: str) -> None:
    """Checks that the output is what the labels need: a loss, or logits."""
    wanted, dims = ("a scalar loss", 0) if labels == "empirical" else ("logits [num_labels]", 1)
    shape, kind = getattr(out, "shape", None), getattr(out, "dtype", None)
    if shape is None or kind is None or len(shape) != dims or 0 in shape or not jnp.issubdtype(kind, jnp.floating):
        found = type(out).__name__ if shape is None else f"{kind} {list(shape)}"
        raise UserError(f"with labels {labels!r}, fn must return {wanted} of one example as floats, got {found}")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the tree"


def _one(fn: Callable[..., Array], labels: str, key: Array) -> Callable[..., tuple[Any, Any]]:
    """A function (tree, (example, its number), direction, *rest) -> (weight, gradients)."""

    def one(tree: Any, numbered: Any, direction: Array, *rest: Any) -> tuple[Any, Any]:
        example, number = numbered
        out, backward = jax.vjp(lambda t: fn(t, example, *rest), tree)
        _check_output(out, labels)
        if labels == "empirical":
            return 1.0, backward(jnp.ones_like(out))[0]
        own = jax.random.fold_in(key, number)
        if out.shape == (1,):
            noise = jax.random.normal(own, out.shape, out.dtype) if labels == "sampled" else jnp.ones_like(out)
            return 1.0, backward(2**0.5 * noise)[0]
        probabilities = jax.nn.softmax(out)
        if labels == "sampled":
            drawn = jax.random.categorical(own, out)
            return 1.0, backward(jax.nn.one_hot(drawn, out.size, dtype=out.dtype) - probabilities)[0]
        towards = jax.nn.one_hot(direction, out.size, dtype=out.dtype)
        return probabilities[direction], backward(towards - probabilities)[0]

    return one


def _compiled(
    one: Callable, fn: Callable, tree: Any, shapes: Any, rest: tuple, labels: str, value: Callable[[Array], Array],
    microbatch: int | None, limit: int | None, mesh: Mesh | None,
) -> tuple[Callable, int, list[Any]]:  # fmt: skip
    """The jitted step for examples of these shapes, the microbatch per device, and the constants."""
    numbered = (shapes, jax.ShapeDtypeStruct((), "int32"))
    directions = 1
    if labels == "expected":
        logits = jax.eval_shape(fn, tree, shapes, *rest)
        _check_output(logits, labels)
        directions = logits.size
    with _full_precision():
        cut = per_example.cut(one, tree, numbered, rest, directions)
    cpu = jax.default_backend() == "cpu"
    most = microbatch
    if most is None:
        fits = (_memory() if limit is None else limit) // max(1, per_example.bytes_per_example(cut, cpu))
        most = max(1, min(fits, MOST.get(jax.default_backend(), MOST_ELSEWHERE)))

    def step(total: Any, tree: Any, chunk: Any, weights: Array, rest: tuple, constants: Any) -> tuple[Any, Array]:
        with _full_precision():
            return per_example.add(cut, value, total, tree, chunk, weights, rest, constants, one_by_one=cpu)

    if mesh is None:
        return jax.jit(step, donate_argnums=0), most, cut.constants[1]

    def shard(total: Any, *args: Any) -> tuple[Any, Array]:
        own, finite = step(jax.tree.map(lambda x: x[0], total), *args)
        return jax.tree.map(lambda x: x[None], own), finite

    over, all_of = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (over, all_of, over, over, all_of, all_of)
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(over, over), check_vma=False)
    return jax.jit(sharded, donate_argnums=0), most, cut.constants[1]


def _full_precision() -> AbstractContextManager[None]:
    """Computes float32 products in float32, not in TF32 or bfloat16, unless the user chose a precision."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return nullcontext() if chosen is not None else jax.default_matmul_precision("highest")


def _memory() -> int:
    """The part of the device's memory that single examples may use, in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(SHARE * stats["bytes_limit"])
    return int(SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _check_finite(finite: Array, rows: np.ndarray, chunk: Any, one: Callable, tree: Any, rest: tuple) -> None:
    """Raises a UserError that names the first example whose gradient is not finite, and the first such leaf."""
    bad = np.flatnonzero(~np.asarray(finite)[: rows.size])
    if not bad.size:
        return
    example = jax.tree.map(lambda x: x[bad[0]], chunk)
    _, gradients = one(tree, (example, int(rows[bad[0]])), 0, *rest)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    where = [_name(path) for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
    of = where[0] if where else "an intermediate value"
    raise UserError(f"the gradient of {of} is not finite at example {rows[bad[0]]}: look for NaN or Inf")
