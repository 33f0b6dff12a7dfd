"""The criterion `kernel`: tangent kernels of every candidate, from the gradients of single examples' logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.partition import map_leaves, rates, split
from jpeft.core.site import layer_of
from jpeft.core.transform import SHARED, Chain, Leaves
from jpeft.core.tree import flatten
from jpeft.data import batching
from jpeft.data.batching import Batch
from jpeft.importance.fisher import fisher
from jpeft.plans import gains, kernel
from jpeft.plans.fishpal import Candidates
from jpeft.plans.gains import Moments, Rate
from jpeft.run import config as configs
from jpeft.run.measuring import Found, alone, lengths, num_examples, prepare
from jpeft.run.seed import Seed
from jpeft.training.step import eval_step, single_logits, single_loss

__all__ = ["by_kernel", "features", "kernels", "preconditioner"]

SHARED_KEY = -1  # stands for a layer where leaves are of no single one
SKETCH = 2**14  # columns for one module in one layer; where it has more entries, they are added up with random signs
CHUNK = 8  # examples whose gradients are held at once


def by_kernel(seed: Seed, candidates: Candidates) -> Found:
    """The held-out loss of plans in the linearised model, trained for as long as the run is.

    Raises:
      UserError: if the task is tagging, which has logits for every word.
    """
    task, train = seed.data.task, seed.config.train
    if task.answers.by_token:
        raise UserError(f"config.fishpal.criterion 'kernel' needs one answer a row, not {task.kind}: expected 'race'")
    ready = prepare(seed, num_examples(seed))
    examples = batching.take(seed.data.train, ready.rows)
    batches, order = batching.by_length(examples, lengths(seed))
    original = np.argsort(order)
    rate = configs.learning_rate(seed.config)
    labels = jnp.asarray(examples.labels)
    # Where training starts: without modules, although some, such as prefixes, act before they have trained.
    look, base = jax.jit(eval_step(seed.model, Chain(()))), {"params": ready.params, "peft": {}}
    found = [np.asarray(look({}, base, batch)) for batch in batches]
    logits = np.concatenate(found)[original].astype(np.float64)
    tables: dict[str, dict[int, np.ndarray]] = {}
    passes = ready.passes + examples.size / 3
    for name, entry in candidates.items():
        method, leaves = alone(seed, entry)
        part, fixed = split(leaves)
        tree, rest = {"peft": part}, {"params": ready.params, "peft": fixed}
        loss, factor = single_loss(seed.model, method, task.loss), rates(method)
        squares = fisher(loss, tree, batches, rest, values="moments", grouped=True)["peft"]
        moments = gains.moments(squares, examples.size)
        scale = preconditioner(moments, lambda path, f=factor: rate * f(path), train.batch_size)
        read = jax.jit(features(single_logits(seed.model, method)))
        found = [jax.device_get(read(part, scale, batch, rest)) for batch in batches]
        tables[name] = kernels({key: np.concatenate([each[key] for each in found])[original] for key in found[0]})
        passes += examples.size * (1 + (1 + 2 * logits.shape[1]) / 3)
        seed.console.say(f"  {name}: tangent kernels of {examples.size} examples")

    def mean_loss(values: np.ndarray, rows: np.ndarray) -> float:
        return float(task.loss(jnp.asarray(values, jnp.float32), labels[rows]).mean())

    slopes = jax.grad(lambda z: task.loss(z, labels).sum())(jnp.asarray(logits, jnp.float32))
    linear = kernel.Linear(
        {layer: {name: tables[name][layer] for name in tables} for layer in tables[next(iter(tables))]},
        logits,
        -np.asarray(slopes, np.float64),
        {"classification": 1.0, "regression": 2.0, "multilabel": 1 / task.num_labels}[task.kind],
        ready.a.size,
        # A rate that rises and falls in straight lines is half its peak on average.
        train.num_epochs * batching.num_batches(seed.data.train.size, train.batch_size) / 2,
        mean_loss,
    )
    about = {"train_rows": ready.rows.tolist()}
    return Found(kernel.scores(linear), passes, about, lambda choice: -kernel.held_out_loss(linear, choice))


def preconditioner(of: Moments, rate: Rate, batch_size: int) -> Leaves:
    """Like the leaves, float32: the square root of what Adam multiplies a gradient by, eta / sqrt(E[batch mean^2])."""

    def root(path: tuple[str, ...], mean: np.ndarray, square: np.ndarray) -> np.ndarray:
        size = gains.adam_size(mean, square, of.n, batch_size)
        return np.sqrt(np.divide(rate(path), size, out=np.zeros_like(size), where=size > 0)).astype(np.float32)

    flat = iter(jax.tree.leaves(of.square))
    return map_leaves(lambda path, mean: root(path, mean, next(flat)), of.mean)


def features(
    logits: Callable[[Any, Batch, Any], Array],
) -> Callable[[Leaves, Leaves, Batch, Any], dict[int, Array]]:
    """The function (leaves, scale, batch, rest) -> {layer: [b, C, columns]}; jit it.

    The gradients of every logit of every example, times `scale`, all of one layer side by side: their products are its
    kernel. More than `SKETCH` columns are added up with random signs (CountSketch, Charikar et al. 2002), which keeps
    products right on average, to about one part in 128 of the lengths.

    Args:
      logits: (variables, example, rest) -> [C], as from `single_logits`.
    """

    def of(leaves: Leaves, scale: Leaves, batch: Batch, rest: Any) -> dict[int, Array]:
        def one(example: Batch) -> dict[int, Array]:
            jacobian = jax.jacrev(lambda part: logits({"peft": part}, example, rest))(leaves)
            scaled = jax.tree.map(lambda j, s: j.reshape(len(j), -1) * s.reshape(1, -1), jacobian, scale)
            parts: dict[int, list[Array]] = {}
            for (instance, site, *_), columns in flatten(scaled).items():
                layer = layer_of(site) if site != SHARED else SHARED_KEY
                if layer is None:
                    raise UserError(f"{instance} has leaves at {site!r}, which is not in a layer")
                parts.setdefault(layer, []).append(columns)
            return {layer: _sketched(jnp.concatenate(columns, 1)) for layer, columns in sorted(parts.items())}

        return jax.lax.map(one, batch, batch_size=CHUNK)

    return of


def _sketched(columns: Array) -> Array:
    if columns.shape[1] <= SKETCH:
        return columns
    rng = np.random.default_rng(0)  # the same for all examples
    to, sign = rng.integers(SKETCH, size=columns.shape[1]), rng.choice([-1.0, 1.0], columns.shape[1])
    return jnp.zeros((len(columns), SKETCH)).at[:, to].add(columns * sign.astype(np.float32)[None])


def kernels(found: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Kernels by layer, [n * C, n * C]; what several layers share counts in each of them, in equal parts."""
    products = {}
    for layer, rows in found.items():
        flat = np.asarray(rows, np.float64).reshape(rows.shape[0] * rows.shape[1], -1)
        products[layer] = flat @ flat.T
    shared = products.pop(SHARED_KEY, 0.0) / max(1, len(products))
    return {layer: product + shared for layer, product in products.items()}
