"""What a method trains and what it adds at inference, by layer: the table that a run prints first."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jpeft.core import tree
from jpeft.core.partition import split
from jpeft.core.site import layer_of, stack_of
from jpeft.core.transform import SHARED, Chain, Leaves, Params, Transform, fold, instances, merge, stays

__all__ = ["Row", "Summary", "summary"]


class Row(NamedTuple):
    """One instance of a method in one layer, or a trained part outside the layers.

    Attributes:
      layers: "3", "0-11" for equal neighbours, "encoder/layer 3" where a model has two stacks of layers,
        "shared" for leaves that all sites of an instance read, "" for those in no layer.
      method: the instance, such as "lora_0", or the name of a trained part of the base, such as "classifier".
      trainable: number of trained parameters.
      added: number of entries at inference that are not in the base: after `fold` and `merge`.
      added_bytes: their size.
    """

    layers: str
    method: str
    trainable: int
    added: int
    added_bytes: int


class Summary(NamedTuple):
    """The rows, and the base size that percentages refer to; `str` gives a Markdown table."""

    rows: tuple[Row, ...]
    base: int

    def __str__(self) -> str:
        """The table, aligned, with a total."""
        rows = self.rows
        total = Row(
            "", "total", sum(r.trainable for r in rows), sum(r.added for r in rows), sum(r.added_bytes for r in rows)
        )
        head = ("layers", "method", "trains", "%", "adds at inference", "%", "bytes")
        body = [self._cells(row) for row in (*rows, total)]
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = [
            "| " + " | ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in (head, *body)
        ]
        rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])

    def _cells(self, row: Row) -> tuple[str, ...]:
        trains, added = (f"{100 * n / self.base:.3f}" for n in (row.trainable, row.added))
        return row.layers, row.method, f"{row.trainable:,}", trains, f"{row.added:,}", added, f"{row.added_bytes:,}"


def summary(transform: Transform | Chain, leaves: Leaves, params: Params, trained: Params | None = None) -> Summary:
    """Counts, by layer and method, what trains and what is left at inference after `fold` and `merge`.

    Args:
      transform: a method or a chain.
      leaves: its leaves.
      params: the base parameters; percentages are relative to their number.
      trained: the part of `params` that trains as well, such as the head.

    Returns:
      A `Summary`, whose `str` is a Markdown table.

    >>> import jax, jax.numpy as jnp, flax.linen as nn, jpeft
    >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(4)]), jnp.ones((1, 8))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> method = jpeft.lora(rank=2, targets="layers_0")
    >>> print(jpeft.summary(method, jpeft.init(method, jax.random.key(1), jpeft.sites(model, x)), params))
    | layers | method | trains |      % | adds at inference |     % | bytes |
    |-------:|-------:|-------:|-------:|------------------:|------:|------:|
    |      0 | lora_0 |     32 | 29.630 |                 0 | 0.000 |     0 |
    |        |  total |     32 | 29.630 |                 0 | 0.000 |     0 |
    """
    left = jax.eval_shape(lambda leaves: _deployed(transform, leaves, params), leaves)
    rows: list[Row] = []
    for name in instances(transform):
        trains, kept = _by_layer(split(leaves[name])[0]), _by_layer(left.get(name, {}))
        placed = []
        for place in sorted({**trains, **kept}, key=lambda place: (place.layer < 0, place)):
            own, here = trains.get(place, {}), kept.get(place, {})
            placed.append((place, Row("", name, tree.count(own), tree.count(here), tree.num_bytes(here))))
        rows += _joined(placed)
    rows += [Row("", name, tree.count(x), 0, 0) for name, x in (trained or {}).items()]
    return Summary(tuple(rows), tree.count(params))


def _deployed(transform: Transform | Chain, leaves: Leaves, params: Params) -> Leaves:
    """The leaves that are left at inference, by the instance names of the whole transform."""
    folded = fold(transform, leaves)
    return dict(zip(stays(transform, folded), merge(transform, folded, params).leaves.values(), strict=True))


class Place(NamedTuple):
    """The location of leaves: a numbered layer of a stack, such as 3 of "encoder/layer", or elsewhere (-1)."""

    stack: str
    layer: int


def _by_layer(leaves: Mapping[str, Any]) -> dict[Place, dict[str, Any]]:
    """Leaves by layer; shared leaves, and those in no layer, have their own places."""
    placed: dict[Place, dict[str, Any]] = {}
    for path, own in leaves.items():
        layer = layer_of(path)
        place = Place(SHARED, -1) if path == SHARED else Place(stack_of(path) or "", -1 if layer is None else layer)
        placed.setdefault(place, {})[path] = own
    return placed


def _joined(rows: Sequence[tuple[Place, Row]]) -> list[Row]:
    """Joins neighbouring layers with the same numbers into one row with their sum."""
    runs: list[tuple[list[Place], Row]] = []
    stacks = {place.stack for place, _ in rows if place.layer >= 0}
    for place, row in rows:
        last = runs[-1] if runs else None
        if last and place.layer > 0 and last[0][-1] == place._replace(layer=place.layer - 1) and last[1] == row:
            last[0].append(place)
        else:
            runs.append(([place], row))
    return [_run(places, row, len(stacks) > 1) for places, row in runs]


def _run(places: Sequence[Place], row: Row, several_stacks: bool) -> Row:
    n, first, last = len(places), places[0], places[-1]
    text = first.stack if first.layer < 0 else str(first.layer) if n == 1 else f"{first.layer}-{last.layer}"
    if several_stacks and first.layer >= 0:
        text = f"{first.stack} {text}"
    return Row(text, row.method, n * row.trainable, n * row.added, n * row.added_bytes)
