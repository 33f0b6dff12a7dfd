"""Inference-time intervention: shift the output of a few attention heads along a direction that a probe found.

Li et al. 2023, arXiv:2306.03341; reference: likenneth/honest_llama. No training: a logistic probe on the output of
each attention head separates two classes of examples. The heads with the most accurate probes are shifted along the
difference of their class means, at every token, before the attention's output projection. The shift is a constant
vector, so it folds into the projection's bias and costs nothing. Probes read the first token, as the classifiers here
do; the reference, a language model, reads the last.

    heads = activations(model, params, ids, mask)
    found = probe(heads[train], labels[train], heads[held_out], labels[held_out])
    method = iti(found, strength=15.0)
    leaves = jpeft.init(method, key, sites)
    better = jpeft.merge(method, leaves, params).params
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.hook import apply
from jpeft.core.site import Site, Sites, find, matches, sites
from jpeft.core.transform import FIXED, Call, Chain, Context, Leaves, Params, Transform, chain
from jpeft.core.tree import at, replace
from jpeft.transforms.parts.linear import sizes

__all__ = ["Probes", "activations", "iti", "probe"]

CORE, OUTPUT = "attention/core", "attention/output"


class Probes(NamedTuple):
    """The results of the probes of all heads.

    Attributes:
      accuracy: [L, h], on held-out examples.
      direction: [L, h, k], unit vectors from the mean of class 0 to the mean of class 1.
      deviation: [L, h], standard deviation of the activations along the direction.
    """

    accuracy: np.ndarray
    direction: np.ndarray
    deviation: np.ndarray


def activations(
    model: nn.Module,
    params: Params,
    input_ids: Array,
    mask: Array,
    token_type_ids: Array | None = None,
    batch_size: int = 32,
    transform: Transform | Chain | None = None,
    leaves: Leaves | None = None,
) -> np.ndarray:
    """The outputs of every attention head at the first token.

    With a prompt, the first token is a virtual one, which the head then reads.

    Args:
      model: a `jpeft.models.Bert`, or any model with sites "attention/core" that return [b, h, t, k].
      params: its parameters.
      input_ids: [n, t].
      mask: [n, t], 0 for padding.
      token_type_ids: [n, t], the text of a pair that a token belongs to; None means 0.
      batch_size: rows at a time.
      transform: the method that the model was trained with, if not merged.
      leaves: its leaves.

    Returns:
      Float32 [n, L, h, k].
    """
    types = np.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    where = [f"{site.path}/__call__" for site in find(sites(model, input_ids[:1], mask[:1], types[:1]), CORE)]
    method = chain() if transform is None else transform

    @jax.jit
    def run(params: Params, leaves: Leaves, ids: Array, mask: Array, types: Array) -> Array:
        # A wrap that stored its arguments would leak tracers under remat; linen's own collection does not.
        _, kept = apply(
            model,
            method,
            {"params": params, "peft": leaves},
            ids,
            mask,
            types,
            mask=mask,
            capture_intermediates=lambda module, _: matches(CORE, "/".join(module.path)),
            mutable=["intermediates"],
        )
        return jnp.stack([at(kept["intermediates"], path)[0][:, :, 0] for path in where], 1).astype(jnp.float32)

    starts = range(0, len(input_ids), batch_size)
    rows = [tuple(x[i : i + batch_size] for x in (input_ids, mask, types)) for i in starts]
    return np.concatenate([run(params, leaves or {}, *row) for row in rows])


def probe(train: np.ndarray, train_labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray) -> Probes:
    """Fits a logistic probe to every head and computes the direction between the classes.

    Args:
      train: [n, L, h, k], from `activations`.
      train_labels: [n], 0 or 1.
      held_out: [m, L, h, k], to measure the accuracy of the probes.
      held_out_labels: [m].

    Returns:
      The probes, in float arrays: accuracy and deviation [L, h], direction [L, h, k].

    Raises:
      UserError: if the labels are not two classes, the shapes do not fit, no rows are held out, or an activation is not
        finite.
    """
    from sklearn.linear_model import LogisticRegression

    if set(np.unique(train_labels)) != {0, 1}:
        raise UserError(f"probes need the labels 0 and 1, got {sorted(set(np.unique(train_labels).tolist()))}")
    if (
        train.shape[1:] != held_out.shape[1:]
        or len(train) != len(train_labels)
        or len(held_out) != len(held_out_labels)
    ):
        raise UserError(f"activations {train.shape} and {held_out.shape} do not fit each other or their labels")
    if not len(held_out):
        raise UserError("expected held-out rows to measure the accuracy of the probes on, got none")
    for name, x in (("train", train), ("held_out", held_out)):
        if not np.isfinite(x).all():
            raise UserError(f"the activations in {name} are not finite")
    accuracy = np.zeros(train.shape[1:3])
    for layer, head in np.ndindex(*accuracy.shape):
        fitted = LogisticRegression(max_iter=1000).fit(train[:, layer, head], train_labels)
        accuracy[layer, head] = fitted.score(held_out[:, layer, head], held_out_labels)
    difference = train[train_labels == 1].mean(0) - train[train_labels == 0].mean(0)
    direction = difference / np.maximum(np.linalg.norm(difference, axis=-1, keepdims=True), 1e-12)
    everything = np.concatenate([train, held_out])
    return Probes(accuracy, direction, np.einsum("nlhk,lhk->nlh", everything, direction).std(0))


def iti(probes: Probes, num_heads: int = 48, strength: float = 15.0, targets: str = OUTPUT) -> Transform:
    """Shifts the heads with the most accurate probes towards class 1: x + strength * deviation * direction.

    Args:
      probes: from `probe`.
      num_heads: the number of heads to shift, or all if there are fewer. Ties go to the earlier head.
      strength: alpha; negative values shift towards class 0.
      targets: pattern of the attention's output projections, one per layer, see `jpeft.find`.

    Returns:
      A transform with leaves {path: {"fixed": {"shift": [d]}}} where a head is shifted; nothing trains. It merges into
      the bias of the projection.

    Raises:
      UserError: if `num_heads` is not a positive integer, or `strength` is 0 or not finite; in `init`, if the
        projections do not match the probed layers.
    """
    sizes(num_heads=num_heads)
    if not 0 < abs(strength) < float("inf"):
        raise UserError(f"strength must be a finite number other than 0, got {strength!r:.60}")
    best = np.argsort(-probes.accuracy.ravel(), kind="stable")[:num_heads]
    chosen = np.isin(np.arange(probes.accuracy.size), best).reshape(probes.accuracy.shape)
    shift = strength * (chosen * probes.deviation)[..., None] * probes.direction

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del key, params
        where = find(sites, targets)
        layers, width = len(shift), int(np.prod(shift.shape[1:]))
        if len(where) != layers or any(site.args[0].shape[-1] != width for site in where):
            raise UserError(
                f"{layers} layers of {width} channels were probed, but {targets!r} matches {len(where)} sites"
            )
        vectors = {site.path: jnp.asarray(own.reshape(-1), jnp.float32) for site, own in zip(where, shift, strict=True)}
        return {path: {FIXED: {"shift": own}} for path, own in vectors.items() if own.any()}

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        (x,) = args
        return call(x + leaves[FIXED]["shift"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)))

    def merge(leaves: Leaves, params: Params) -> Params:
        for path, own in leaves.items():
            if "bias" not in at(params, path):
                raise UserError(f"iti merges into a bias, which {path!r} does not have: apply it with jpeft.apply")
            params = replace(
                params, path, lambda p, own=own: {**p, "bias": p["bias"] + own[FIXED]["shift"] @ p["kernel"]}
            )
        return params

    return Transform("iti", init, wrap, merge)
