"""Sums over per-example gradients, at about the cost of one gradient of their batch.

The gradient of a weight is a product: of a layer's inputs and the cotangents of its outputs. `vmap(grad)` turns these
into batched products, which are slow on CPU, and holds the gradients of all examples at once. Here the jaxpr of one
example's gradient is cut just before those products:

    one example:   (tree, example) -> head -> x [t, in], d [t, out], ... -> tails -> x^T d [in, out], ...

The head, which is all of the forward and the backward pass, runs under `vmap`: its weights are shared, so its products
stay large. Each tail then runs for one leaf at a time: on CPU example by example, adding its function of the gradient
to a running total that stays in the cache; elsewhere for all examples at once. Embedding tables are cheaper still: they
are updated only in the few rows that an example looked up. Other gradients, such as those of biases, are small and come
directly from the head.

Nothing is approximated, and any function is supported: where a cut would not help, the head computes the gradient.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Literal

__all__ = ["Cut", "add", "bytes_per_example", "cut"]

LAYOUT = {"convert_element_type", "copy", "expand_dims", "neg", "reshape", "squeeze", "transpose"}
PRODUCTS = {"dot_general", "scatter-add"}
INLINED = {"jit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr",
           "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}  # fmt: skip


class Tail(NamedTuple):
    """Computes the gradient of one leaf from values of the head: `equations` from `inputs` to `output`."""

    equations: list[Any]
    inputs: list[Any]
    output: Any


class Cut(NamedTuple):
    """The gradients of one example in one of m directions, cut in two.

    Attributes:
      inputs: the variables of the leaves of (tree, example, rest, direction), in that order.
      sizes: the number of leaves of each of the four.
      constants: the variables of the function's closed-over constants, and their values.
      head: the equations that run for all examples at once.
      weight: the variable of the direction's weight.
      tails: one per leaf of the tree.
      varies: for each variable, whether it depends on the example and whether on the direction.
      directions: m.
    """

    inputs: list[Any]
    sizes: tuple[int, int, int, int]
    constants: tuple[list[Any], list[Any]]
    head: list[Any]
    weight: Any
    tails: list[Tail]
    varies: dict[Any, tuple[bool, bool]]
    directions: int

    @property
    def front(self) -> list[Any]:
        """The variables where the head ends."""
        found = dict.fromkeys(v for tail in self.tails for v in tail.inputs)
        return [v for v in (*found, self.weight) if not isinstance(v, Literal)]


def cut(one: Callable[..., tuple[Array, Any]], tree: Any, example: Any, rest: tuple, directions: int) -> Cut:
    """Traces `one` once and cuts it.

    Args:
      one: (tree, example, direction, *rest) -> (weight, gradients like `tree`); `direction` is an int32 scalar.
      tree: arrays, or their shapes and dtypes.
      example: a single example, as arrays or shapes and dtypes.
      rest: further arguments of `one`, as arrays or shapes and dtypes.
      directions: m; `one` is called with the directions 0 to m - 1.
    """
    parts = (tree, example, rest, jax.ShapeDtypeStruct((), "int32"))
    flat, treedef = jax.tree.flatten(parts)
    # Only shapes: arrays on several devices would write these devices into the equations.
    flat = [jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in flat]

    def outputs(*leaves: Any) -> list[Any]:
        tree, example, rest, direction = treedef.unflatten(leaves)
        weight, gradients = one(tree, example, direction, *rest)
        return [weight, *jax.tree.leaves(gradients)]

    traced = jax.make_jaxpr(outputs)(*flat)
    closed = jax.make_jaxpr(lambda *leaves: _inline(traced, leaves))(*flat)
    jaxpr = closed.jaxpr
    producers = {v: (place, e) for place, e in enumerate(jaxpr.eqns) for v in e.outvars}
    weight, *gradients = jaxpr.outvars
    tails = [_tail(gradient, producers) for gradient in gradients]
    trees, examples, rests, _ = (len(jax.tree.leaves(part)) for part in parts)
    inputs = list(jaxpr.invars)
    varies: dict[Any, tuple[bool, bool]] = dict.fromkeys([*inputs, *jaxpr.constvars], (False, False))
    varies.update(dict.fromkeys(inputs[trees : trees + examples], (True, False)))
    varies[inputs[-1]] = (False, True)
    for e in jaxpr.eqns:
        of = [varies[v] for v in e.invars if not isinstance(v, Literal)]
        varies.update(dict.fromkeys(e.outvars, (any(a for a, _ in of), any(b for _, b in of))))
    sizes = (trees, examples, rests, 1)
    whole = Cut(inputs, sizes, (list(jaxpr.constvars), list(closed.consts)), [], weight, tails, varies, directions)
    return whole._replace(head=_needed(jaxpr.eqns, whole.front))


def add(
    cut: Cut, value: Callable[[Array], Array], total: Any, tree: Any, chunk: Any, weights: Array, rest: tuple,
    constants: Sequence[Any], one_by_one: bool,
) -> tuple[Any, Array]:  # fmt: skip
    """Adds sum_i weights_i sum_c w_ic value(gradient of example i in direction c) to `total`.

    Args:
      cut: the cut of the function to differentiate.
      value: elementwise, such as the square; 0 at 0. Or several such functions, stacked along a new leading axis.
      total: a pytree like `tree`, with that axis.
      tree: as given to `cut`.
      chunk: b examples: shaped like the one given to `cut`, with a leading axis.
      weights: [b], of the examples.
      rest: as given to `cut`.
      constants: `cut.constants[1]`, passed as an argument so that they are not compiled in.
      one_by_one: whether the tails run example by example, as is best on CPU, or for all at once.

    Returns:
      The new total, and [b] bool, whether all values of an example are finite.
    """
    b, m = len(weights), cut.directions
    front = cut.front
    trees, examples, rests, one = cut.sizes

    def head(*leaves: Any) -> list[Any]:
        env = dict(zip(cut.inputs, leaves, strict=True)) | dict(zip(cut.constants[0], constants, strict=True))
        _run(cut.head, env)
        return [env[v] for v in front]

    leaves = [*jax.tree.leaves((tree, chunk, rest)), jnp.arange(m, dtype=jnp.int32)]
    by_direction = jax.vmap(head, [None] * (len(leaves) - 1) + [0], [0 if cut.varies[v][1] else None for v in front])
    by_example = jax.vmap(
        by_direction,
        [None] * trees + [0] * examples + [None] * (rests + one),
        [0 if cut.varies[v][0] else None for v in front],
    )
    env = dict(zip(front, by_example(*leaves), strict=True))
    finite = jnp.ones(b, bool)
    for v, x in env.items():
        if cut.varies[v][0] and jnp.issubdtype(x.dtype, jnp.floating):
            finite &= jnp.isfinite(x).reshape(b, -1).all(1)
    shares = jnp.broadcast_to(_spread(env, cut.weight, cut.varies), (b, m))
    shares = shares.astype(jnp.promote_types(shares.dtype, jnp.float32)) * weights[:, None].astype(shares.dtype)
    old, treedef = jax.tree.flatten(total)
    new = [
        _add_leaf(leaf, tail, env, cut.varies, shares, value, one_by_one)
        for leaf, tail in zip(old, cut.tails, strict=True)
    ]
    return treedef.unflatten(new), finite


def bytes_per_example(cut: Cut, one_by_one: bool) -> int:
    """The peak memory of the head for one example, in bytes, as if nothing were fused.

    An upper bound on what XLA plans with jax 0.10; with jax 0.12 it plans 4 % more for one function of the tests.

    The largest tail is added: a gradient and its square, where those of all examples exist at once; a few times the
    rows of an embedding table.
    """

    def size(v: Any) -> int:
        if isinstance(v, Literal) or not any(cut.varies[v]):
            return 0
        return _size(v) * v.aval.dtype.itemsize * (cut.directions if cut.varies[v][1] else 1)

    last = {v: i for i, e in enumerate(cut.head) for v in e.invars if not isinstance(v, Literal)}
    last |= dict.fromkeys(cut.front, len(cut.head))
    ends: dict[int, list[Any]] = {}
    for v, i in last.items():
        ends.setdefault(i, []).append(v)
    live = peak = sum(map(size, cut.inputs))
    for i, e in enumerate(cut.head):
        live += sum(size(v) for v in e.outvars if v in last)
        peak = max(peak, live)
        live -= sum(map(size, ends.get(i, ())))

    def tail_bytes(tail: Tail) -> int:
        scatter = _rows(tail)
        if scatter is not None:  # which rows are equal, as booleans and as numbers, and three times the rows
            rows, item = scatter.invars[2].aval, tail.output.aval.dtype.itemsize
            d, s = rows.shape[-1], rows.size // rows.shape[-1]
            return s * s * (1 + item) + 3 * s * d * item
        return 0 if one_by_one or not tail.equations else 2 * _size(tail.output) * tail.output.aval.dtype.itemsize

    return peak + cut.directions * max(map(tail_bytes, cut.tails), default=0)


def _tail(gradient: Any, producers: dict[Any, tuple[int, Any]]) -> Tail:
    """Traces a gradient back to the inputs of its product, past changes of layout and sums of products.

    If those are not smaller than the gradient itself, nothing is deferred. `producers` maps each variable to its
    position in the program and its equation.
    """
    equations: dict[int, Any] = {}
    inputs: dict[Any, None] = {}
    ahead, seen = [gradient], set()
    while ahead:
        v = ahead.pop()
        if isinstance(v, Literal) or v in seen:
            continue
        seen.add(v)
        place, e = producers.get(v, (-1, None))
        if e is None or len(e.outvars) != 1:
            inputs[v] = None
            continue
        variables, name = [x for x in e.invars if not isinstance(x, Literal)], e.primitive.name
        scaled = name == "mul" and (len(variables) == 1 or (len(variables) == 2 and min(map(_size, variables)) == 1))
        if not (name in LAYOUT or name in PRODUCTS or name == "add_any" or scaled or not variables):
            inputs[v] = None
            continue
        further = variables
        if name in PRODUCTS:  # of a product's inputs, only constants such as a table of zeros are recomputed
            further = [x for x in variables if _constant(x, producers)]
        elif scaled:
            further = [max(variables, key=_size)]
        inputs.update(dict.fromkeys(x for x in variables if x not in further))
        ahead += further
        equations[place] = e
    if isinstance(gradient, Literal) or sum(map(_size, inputs)) < _size(gradient):
        return Tail([equations[place] for place in sorted(equations)], list(inputs), gradient)
    return Tail([], [gradient], gradient)


def _constant(v: Any, producers: dict[Any, tuple[int, Any]]) -> bool:
    return v in producers and all(isinstance(x, Literal) for x in producers[v][1].invars)


def _add_leaf(
    total: Array, tail: Tail, env: dict[Any, Array], varies: dict[Any, tuple[bool, bool]], weights: Array,
    value: Callable[[Array], Array], one_by_one: bool,
) -> Array:  # fmt: skip
    """Adds the weighted values of one leaf's gradients over all examples; `weights` are [b, m]."""
    weights = weights.astype(total.dtype)

    def gradient(values: Iterable[Any]) -> Array:
        env = dict(zip(tail.inputs, values, strict=True))
        _run(tail.equations, env)
        out = tail.output.val if isinstance(tail.output, Literal) else env[tail.output]
        return value(jnp.asarray(out).astype(total.dtype))

    values = [env[v] for v in tail.inputs]
    if not any(any(varies[v]) for v in tail.inputs):  # the same for all, such as zeros where the loss ignores a leaf
        return total + weights.sum() * gradient(values)
    scatter = _rows(tail)
    if scatter is not None:
        return _add_rows(total, scatter, env, varies, weights, value)
    if not tail.equations or not one_by_one:
        (b, m), axes = weights.shape, [tuple(0 if varying else None for varying in varies[v]) for v in tail.inputs]
        each = jax.vmap(lambda *x: gradient(x), [w for _, w in axes], axis_size=m)
        found = jax.vmap(each, [e for e, _ in axes], axis_size=b)(*values)
        return total + jnp.tensordot(weights, found, 2)

    def of_example(total: Array, given: Any) -> tuple[Array, None]:
        def of_direction(total: Array, given: Any) -> tuple[Array, None]:
            weight, moving = given
            directional = dict(zip(directed, moving, strict=True))
            return total + weight * gradient([directional.get(v, known[v]) for v in tail.inputs]), None

        weight, own = given
        known = dict(zip(tail.inputs, values, strict=True)) | dict(zip(batched, own, strict=True))
        directed = [v for v in tail.inputs if varies[v][1]]
        return jax.lax.scan(of_direction, total, (weight, [known[v] for v in directed]))[0], None

    batched = [v for v in tail.inputs if varies[v][0]]
    return jax.lax.scan(of_example, total, (weights, [env[v] for v in batched]))[0]


def _rows(tail: Tail) -> Any:
    """The scatter of an embedding table's gradient, if the tail is just that."""
    names = [e.primitive.name for e in tail.equations]
    if "scatter-add" not in names or set(names) - {"scatter-add", "broadcast_in_dim", "convert_element_type"}:
        return None
    scatters = [e for e in tail.equations if e.primitive.name == "scatter-add"]
    operand, indices, updates = scatters[0].invars
    numbers, table = scatters[0].params["dimension_numbers"], operand.aval.shape
    into = [e.invars[0] for e in tail.equations if e.outvars == [operand] and e.primitive.name == "broadcast_in_dim"]
    whole_rows = (
        len(into) == 1
        and isinstance(into[0], Literal)
        and into[0].val == 0
        and tuple(numbers.inserted_window_dims) == tuple(numbers.scatter_dims_to_operand_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.update_window_dims) == (len(updates.aval.shape) - 1,)
        and len(table) == 2
        and updates.aval.shape[-1] == table[1]
        and indices.aval.shape[-1] == 1
    )
    return scatters[0] if len(scatters) == 1 and whole_rows and set(tail.inputs) == {indices, updates} else None


def _add_rows(
    total: Array, scatter: Any, env: dict[Any, Array], varies: dict[Any, tuple[bool, bool]], weights: Array,
    value: Callable[[Array], Array],
) -> Array:  # fmt: skip
    """Adds to the rows that an example looked up. The gradient of a row that was looked up twice is the sum of both."""
    _, indices, updates = scatter.invars
    (b, m), d = weights.shape, total.shape[-1]
    ids = jnp.broadcast_to(_spread(env, indices, varies), (b, m, *indices.aval.shape)).reshape(b * m, -1)
    rows = jnp.broadcast_to(_spread(env, updates, varies), (b, m, *updates.aval.shape)).reshape(b * m, -1, d)
    mode = scatter.params["mode"]
    if scatter.params["mode"] == jax.lax.GatherScatterMode.CLIP:  # two rows beyond the table are one
        ids = jnp.clip(ids, 0, total.shape[-2] - 1)
    same = ids[:, :, None] == ids[:, None, :]
    first = jnp.argmax(same, axis=2) == jnp.arange(ids.shape[1])[None]
    summed = jnp.einsum("nts,nsd->ntd", same.astype(total.dtype), rows.astype(total.dtype))
    counted = (first * weights.reshape(-1, 1))[..., None]

    def into(total: Array, found: Array) -> Array:
        rows = (found * counted).reshape(-1, d)
        return total.at[ids.reshape(-1)].add(rows, mode=mode, wrap_negative_indices=False)

    found = value(summed)
    return into(total, found) if total.ndim == 2 else jax.vmap(into)(total, found)


def _spread(env: dict[Any, Array], v: Any, varies: dict[Any, tuple[bool, bool]]) -> Array:
    """A value with leading axes for examples and directions, of size 1 where it does not vary."""
    if isinstance(v, Literal):
        return jnp.asarray(v.val)[None, None]
    example, direction = varies[v]
    x = env[v]
    x = x if example else x[None]
    return x if direction else jnp.expand_dims(x, 1)


def _inline(closed: Any, leaves: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with its inner calls inlined."""
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip(jaxpr.invars, leaves, strict=True))
    env |= dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    for e in jaxpr.eqns:
        inner = e.params.get(INLINED.get(e.primitive.name, ""))
        if inner is None:
            _run([e], env)
        else:
            env.update(zip(e.outvars, _inline(inner, [_read(x, env) for x in e.invars]), strict=True))
    return [_read(x, env) for x in jaxpr.outvars]


def _run(equations: Iterable[Any], env: dict[Any, Any]) -> None:
    """Evaluates equations in order, reading from and writing to `env`."""
    for e in equations:
        out = e.primitive.bind(*(_read(x, env) for x in e.invars), **e.primitive.get_bind_params(e.params))
        env.update(zip(e.outvars, out if e.primitive.multiple_results else [out], strict=True))


def _read(x: Any, env: dict[Any, Any]) -> Any:
    return x.val if isinstance(x, Literal) else env[x]


def _needed(equations: Sequence[Any], variables: Iterable[Any]) -> list[Any]:
    """The equations that the variables depend on, in order."""
    wanted, kept = set(variables), []
    for e in reversed(equations):
        if wanted.intersection(e.outvars):
            kept.append(e)
            wanted.update(x for x in e.invars if not isinstance(x, Literal))
    return kept[::-1]


def _size(v: Any) -> int:
    return math.prod(v.aval.shape)
