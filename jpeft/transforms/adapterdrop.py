"""AdapterDrop: adapters that can be left out of the lower layers (Rücklé et al. 2020, arXiv:2010.11918)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.leaves import init_sites
from jpeft.core.site import Site, Sites, layer_of
from jpeft.core.site import layers as layers_of
from jpeft.core.transform import FIXED, Call, Context, Leaves, Params, Transform
from jpeft.transforms.parts.bottleneck import Bottleneck, added, checked, fresh, normal
from jpeft.transforms.parts.places import find_residual

__all__ = ["adapterdrop", "drop_layers"]

_DRAW = 0xAD  # folded into the step's key, so that the draw is independent of other methods


def adapterdrop(
    bottleneck: int | None = None,
    reduction_factor: float = 16,
    activation: str = "relu",
    drop: int = 0,
    robust: bool = True,
    layers: Sequence[int] | None = None,
    targets: str = "ffn_add_norm",
) -> Transform:
    """Pfeiffer adapters that also work without those of the first layers.

    Robust training samples n from 0 ... L - 1 in every step, where L is the number of layers of the model, and the
    layers below n act as if they had no adapter. So one module works with any `drop`. A batch that comes in parts
    (`jpeft.training.step`) has an n for each of them. At inference the first `drop` layers have no adapters: they are
    left out of the graph, and `fold` removes their leaves.

    n is sampled inside the compiled step and layers are masked, so nothing is compiled twice. This saves no training
    time: the masked adapters are still computed, and the backward pass reaches the lowest layer. A step compiled for
    each n could stop above layer n - 1, saving (L - 1) / 2L of the encoder's backward pass on average, for L
    compilations. `robust=False` does that for the single n = `drop` ("specialised" in the paper): those layers have no
    leaves even in training, and XLA drops their backward pass.

    At inference an adapter costs 4 d b floating-point operations per token. Dropped layers cost nothing, and save
    Pfeiffer's second LayerNorm. It cannot be merged.

    Args:
      bottleneck: b; None means d / `reduction_factor`.
      reduction_factor: d / b, used when `bottleneck` is None.
      activation: f, a name in `jpeft.models.bert.ACTIVATIONS`.
      drop: the number of first layers without an adapter at inference; without `robust`, also in training.
      robust: whether training samples the number of layers to leave out.
      layers: adapters only in these layers; None means all.
      targets: pattern of sites with arguments (hidden, residual) in layers, see `jpeft.find`.

    Returns:
      A transform with the leaves of `jpeft.pfeiffer`; if robust, with L as {"fixed": {"num_layers": int32}}.

    Raises:
      UserError: if an option is out of range; in `init`, if a target is missing or not in a layer, or none is left.
    """
    spec = checked(Bottleneck(bottleneck, reduction_factor, activation))
    if isinstance(drop, bool) or not isinstance(drop, int) or drop < 0:
        raise UserError(f"drop must be a non-negative integer, got {drop!r}")

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params
        where = find_residual(sites, targets, layers)
        for site in where:
            if site.layer is None:
                raise UserError(f"site {site.path!r} is not in a numbered layer, which adapterdrop needs")
        num_layers = max(layers_of(sites)) + 1
        if not any(site.layer >= drop for site in where if site.layer is not None):
            raise UserError(f"drop {drop} leaves no adapter: the last one is in layer {where[-1].layer}")

        def make(key: Array, site: Site) -> Leaves:
            fixed = {FIXED: {"num_layers": jnp.asarray(num_layers, jnp.int32)}} if robust else {}
            return {**fresh(spec, key, site, normal), **fixed}

        leaves = init_sites(key, where, make)
        return leaves if robust else drop_layers(leaves, drop)

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
        hidden, residual = args
        drawing = ctx.key is not None and FIXED in leaves
        if not drawing and site.layer is not None and site.layer < drop:
            return call(hidden, residual)
        change = added(spec, leaves, call(hidden, residual), ctx)
        if drawing:
            assert ctx.key is not None
            first = jax.random.randint(jax.random.fold_in(ctx.key, _DRAW), (), 0, leaves[FIXED]["num_layers"])
            change = jnp.where(first <= (site.layer or 0), change, jnp.zeros_like(change))
        return call(hidden + change, residual)

    def fold(leaves: Leaves) -> Leaves:
        left = drop_layers(leaves, drop)
        return {path: {name: x for name, x in own.items() if name != FIXED} for path, own in left.items()}

    return Transform("adapterdrop", init, wrap, fold=fold)


def drop_layers(leaves: Leaves, n: int) -> Leaves:
    """The leaves of an instance without those in the model's first n layers; leaves in no layer stay.

    >>> drop_layers({"encoder/layer_0/ffn_add_norm": {}, "encoder/layer_1/ffn_add_norm": {}}, 1)
    {'encoder/layer_1/ffn_add_norm': {}}

    Args:
      leaves: {site path: leaves} of one instance of any method.
      n: the number of layers.

    Returns:
      A new dict that refers to the remaining leaves.
    """
    return {path: own for path, own in leaves.items() if (layer := layer_of(path)) is None or layer >= n}
