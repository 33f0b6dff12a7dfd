"""The core: a method is a NamedTuple of pure functions, and a hook runs it where the forward pass reaches its sites.

The base model is never edited. Its `params` stay bit-identical; a method keeps its own small pytree beside them, keyed
by instance and then by site, with a "shared" entry for what several sites share:

    variables = {
        "params": {...},                                                  # frozen, as loaded
        "peft": {
            "prefix_0": {"shared": {...}, "encoder/layer_0/attention/core": {...}},
            "lora_0": {"encoder/layer_1/attention/query": {"a": [in, r], "b": [r, out]}, ...},
        },
    }

A forward pass is one call, `apply(model, transform, variables, *args)`. It puts every site's leaves, by reference, next
to that site's own parameters, enters `nn.intercept_methods` and calls `model.apply`. Leaves captured by a closure
instead would be silently wrong under `nn.jit`, whose cache key ignores interceptors. Next to the parameters they go
wherever those go: through jit, grad, vmap and remat, and through the scans and maps inside a model.

Where `nn.scan` or `nn.vmap` stacks the parameters of a site, its leaves are stacked in the same way, under one
"stacked" key for each such axis: {"layers/query": {"stacked": {"a": [48, in, r], "b": [48, r, out]}}}.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.quantised import dense
from jpeft.core.site import Site, Sites, check_unboxed

__all__ = [
    "FIXED",
    "SHARED",
    "STACKED",
    "Call",
    "Chain",
    "Context",
    "Leaves",
    "Merged",
    "Params",
    "Setting",
    "Transform",
    "chain",
    "checked",
    "fold",
    "init",
    "instances",
    "members",
    "merge",
    "prepare",
    "site_key",
    "stays",
    "typed",
]

SHARED = "shared"  # the key, next to an instance's sites, of the leaves that all of them read
STACKED = "stacked"  # the key, at a site, of leaves with a leading axis over copies of the site's parameters
FIXED = "fixed"  # the key, anywhere among the leaves, of those that are stored with the method but never train

Params = Mapping[str, Any]
Leaves = dict[str, Any]


class Context(NamedTuple):
    """What a wrap may need besides its own leaves and the call's arguments.

    Attributes:
      train: whether this is a training pass, that is, whether `apply` was given a dropout key.
      key: the dropout key of this pass, the same at every site: use it directly for one draw per step, and `key_at` for
        one per site. None unless `train`.
      mask: the `mask` given to `apply`, such as [b, t] segment numbers with 0 for padding; None if none was given.
      params: the site's own frozen parameters, dense.
      shared: the leaves that this instance's sites share; {} if there are none.
      model: the model that `apply` was given, for what a site does not know, such as its longest input; None if the
        wrap was called by hand.
    """

    train: bool
    key: Array | None
    mask: Array | None
    params: Params
    shared: Params
    model: Any = None

    def key_at(self, path: str) -> Array | None:
        """The dropout key of one site; None outside training."""
        return None if self.key is None else site_key(self.key, path)


Call = Callable[..., Any]


class Setting(NamedTuple):
    """What a method may use before training, if its leaves depend on data.

    Attributes:
      loss: (variables, example) -> scalar loss of one example, without dropout.
      logits: (variables, example) -> float32 logits [c] of one example, without dropout.
      variables: {"params": all parameters, including the head, "peft": the leaves of the whole chain}.
      instance: the instance to prepare: `variables["peft"][instance]` holds its leaves from `init`.
      sites: the sites of the model.
      sample: (n) -> n examples from a seeded shuffle of the training set, or all if there are fewer: a pytree of arrays
        with a leading axis.
      fisher: (fn, tree, n, *rest, labels=..., values=...) -> `jpeft.fisher` of `fn` over the examples of `sample(n)`,
        grouped into a few lengths.
      key: a PRNG key.
    """

    loss: Callable[[Mapping[str, Any], Any], Array]
    logits: Callable[[Mapping[str, Any], Any], Array]
    variables: Mapping[str, Any]
    instance: str
    sites: Sites
    sample: Callable[[int], Any]
    fisher: Callable[..., Any]
    key: Array


class Transform(NamedTuple):
    """A method: what it adds to a model, and what happens when the forward pass reaches a site that has leaves.

    Attributes:
      name: the method's name; it names the instance in the leaves.
      init: (key, sites, params) -> {site path: leaves, "shared": leaves}.
      wrap: (leaves, site, call, args, ctx) -> out. `call(*args)` runs what it wraps: the site, or the preceding member
        of a chain. None means that the leaves are merged into the parameters inside the forward pass.
      merge: (leaves, params) -> params with the method folded into the base weights, a new pytree. None if impossible.
      fold: (leaves) -> leaves without what only training needs. None if all are needed.
      rate: (path of a leaf) -> learning rate factor, as in LoRA+ for B. None means 1 for all. The path starts at the
        site: ("encoder/layer_1/attention/query", "b").
      decay: (path of a leaf, leaf) -> whether weight decay applies to it. None means the rule of `decays`.
      prepare: (setting) -> leaves that replace those from `init`, if they depend on data, such as the mask of FISH.
        None if they do not.
      penalty: (logits [b, c], again) -> [b], added to the training loss of each example. `again()` returns the logits
        of another training pass over the batch with fresh randomness, for AdaMix to compare. None adds nothing.
      reads_params: whether `wrap` reads the site's own parameters, as DoRA does for their norms. `merge` then leaves
        them unchanged wherever another member comes before it.
      needs_float32: whether the method computes with the base weights themselves, as DoRA does for their norms and SAID
        for its sum, and so needs them in float32 where the model computes in bfloat16.
      factors: (site path, leaves of the site) -> (a [in, r], b [r, out]), if outside training `wrap` computes
        call(x) + (x a) b and nothing else, as LoRA does. None if it does not.
    """

    name: str
    init: Callable[[Array, Sites, Params | None], Leaves]
    wrap: Callable[[Any, Site, Call, tuple[Any, ...], Context], Any] | None
    merge: Callable[[Leaves, Params], Params] | None = None
    fold: Callable[[Leaves], Leaves] | None = None
    rate: Callable[[tuple[str, ...]], float] | None = None
    prepare: Callable[[Setting], Leaves] | None = None
    penalty: Callable[[Array, Callable[[], Array]], Array] | None = None
    decay: Callable[[tuple[str, ...], Any], bool] | None = None
    reads_params: bool = False
    needs_float32: bool = False
    factors: Callable[[str, Any], tuple[Array, Array]] | None = None


class Chain(NamedTuple):
    """Transforms in the order in which they act; created by `chain`."""

    members: tuple[Transform, ...]


class Merged(NamedTuple):
    """The result of `merge`: new parameters, and the members that could not be merged, with their leaves."""

    params: Params
    transform: Chain
    leaves: Leaves


def chain(*transforms: Transform | Chain) -> Chain:
    """Composes transforms in the order written: where two meet at a site, the later one wraps the earlier one.

    Raises:
      UserError: if an argument is not a transform.
    """
    for each in transforms:
        if not isinstance(each, Transform | Chain):
            raise UserError(f"jpeft.chain takes transforms, such as jpeft.lora(), got {each!r:.60}")
    return Chain(tuple(t for each in transforms for t in members(each)))


def members(transform: Transform | Chain) -> tuple[Transform, ...]:
    """The transforms of a chain, in order; a single transform is its own only member."""
    if isinstance(transform, Chain):
        return transform.members
    if not isinstance(transform, Transform):
        raise UserError(f"expected a transform, such as jpeft.lora(), got {transform!r:.60}")
    return (transform,)


def instances(transform: Transform | Chain) -> dict[str, Transform]:
    """The members by instance name: the method's name and a count, "lora_0", "prefix_0", "lora_1"."""
    named: dict[str, Transform] = {}
    for member in members(transform):
        count = sum(other.name == member.name for other in named.values())
        named[f"{member.name}_{count}"] = member
    return named


def site_key(key: Array, path: str) -> Array:
    """A key for one site. It depends only on the path, so leaving out a layer does not change the others' draws."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init(transform: Transform | Chain, key: Array, sites: Sites, params: Params | None = None) -> Leaves:
    """Creates the leaves of a transform.

    Args:
      transform: a method or a chain.
      key: a PRNG key; each instance and site folds in its name, such as "lora_0", so members of other methods do not
        matter.
      sites: the sites of the model, from `sites`.
      params: the model's frozen parameters, for methods that start from them.

    Returns:
      {instance: {site path: leaves, "shared": leaves}}.

    Raises:
      UserError: if a method finds no suitable site, or an argument is not what it should be.
    """
    named = instances(transform)
    if not isinstance(sites, Mapping):
        raise UserError(f"expected the sites of the model, from jpeft.sites(model, x), got {sites!r:.60}")
    if isinstance(key, int | float):
        raise UserError(f"expected a PRNG key, such as jax.random.key(0), got {key!r}")
    check_unboxed(params)
    return {name: member.init(site_key(key, name), sites, params) for name, member in named.items()}


def prepare(transform: Transform | Chain, setting: Setting) -> Leaves:
    """Lets each member with a `prepare` compute its leaves from data, in the order of the chain.

    Args:
      transform: a method or a chain.
      setting: a `Setting` with the fresh leaves of all members; `instance` is set by this function.

    Returns:
      The leaves of all members.

    Raises:
      UserError: as the members do, such as for a budget of entries that is out of range.
    """
    leaves = dict(setting.variables["peft"])
    for name, member in instances(transform).items():
        if member.prepare is not None:
            variables = {**setting.variables, "peft": leaves}
            own = setting._replace(instance=name, variables=variables, key=site_key(setting.key, name))
            leaves = {**leaves, name: member.prepare(own)}
    return leaves


def checked(transform: Transform | Chain, leaves: Leaves) -> dict[str, Transform]:
    """The instances of a transform, if these are leaves of it.

    Raises:
      UserError: if they are not.
    """
    named = instances(transform)
    if set(leaves) != set(named):
        raise UserError(f"leaves of {sorted(leaves)} do not fit a transform with {sorted(named)}")
    return named


def merge(transform: Transform | Chain, leaves: Leaves, params: Params) -> Merged:
    """Folds what it can into the base weights. The base is not modified, so to unmerge, keep the old tree.

    Members without a wrap come first, as in the forward pass, then the others in the order of the chain. A member
    stays if it cannot be merged, or if it wraps one that stays: folded into the weights, it would act before that one.
    If a member that reads the site's own parameters wraps another, both stay. Matrix products are computed in full
    float32 precision, and the result has the dtypes of the base. Quantised kernels become dense, whether anything is
    folded into them or not. Kernels are taken to be what their layers multiply with: where something normalises them
    on the way, as `nn.WeightNorm` does, or `nn.map_variables` changes them, the merged model is another one.

    Args:
      transform: a method or a chain.
      leaves: its leaves.
      params: the base parameters.

    Returns:
      New parameters, the chain of the members that were not merged, and their leaves.

    Raises:
      UserError: if the leaves are not those of the transform.
    """
    staying, named = stays(transform, leaves), instances(transform)
    with jax.default_matmul_precision("highest"):
        for name, member in sorted(named.items(), key=lambda item: item[1].wrap is not None):
            if name not in staying and member.merge is not None:
                params = typed(member.merge(leaves[name], params), params)
    left = Chain(tuple(named[name] for name in staying))
    return Merged(dense(params), left, dict(zip(instances(left), (leaves[name] for name in staying), strict=True)))


def typed(new: Any, old: Any) -> Any:
    """The new parameters in the dtypes of the old ones; what is not touched stays as it is, quantised or not."""
    if new is old:
        return new
    if isinstance(new, Mapping):
        return {name: typed(x, old[name]) for name, x in new.items()}
    return new.astype(old.dtype)


def stays(transform: Transform | Chain, leaves: Leaves) -> list[str]:
    """The instances that `merge` cannot fold into the base, in the order of the chain."""
    named = checked(transform, leaves)
    names = list(named)
    sites = {name: set(leaves[name]) - {SHARED} if named[name].wrap is not None else set() for name in names}
    staying = {name for name in names if named[name].merge is None}
    while True:
        more = set()
        for i, outer in enumerate(names):
            inside = [inner for inner in names[:i] if sites[inner] & sites[outer]]
            if staying.intersection(inside) or (named[outer].reads_params and inside):
                more.add(outer)
            if named[outer].reads_params and outer in staying | more:
                more.update(inside)
        if more <= staying:
            return [name for name in names if name in staying]
        staying |= more


def fold(transform: Transform | Chain, leaves: Leaves) -> Leaves:
    """Drops what only training needs, such as the MLP of a prefix; the same transform reads the smaller leaves.

    Raises:
      UserError: if the leaves are not those of the transform.
    """
    folded = {name: member.fold for name, member in checked(transform, leaves).items()}
    return {name: leaves[name] if fn is None else fn(leaves[name]) for name, fn in folded.items()}
