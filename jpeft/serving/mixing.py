"""What a task has of its own when rows of different tasks share a batch: parameters, and modules of a few kinds.

Modules are of one kind if they can lie in one stack and run as one program: those of LoRA and its relatives, as factors
[in, r] and [r, out], or modules whose wraps compile to the same text. Where a row has no module, zeros are the identity
for factors, and all others have a switch.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.core.errors import UserError
from jpeft.core.hook import apply
from jpeft.core.site import Site, Sites, sites
from jpeft.core.transform import SHARED, Call, Context, Leaves, Transform, fold, instances
from jpeft.core.tree import flatten
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.pretrained import fingerprint
from jpeft.store.modules import Saved
from jpeft.transforms.parts.low_rank import flat

__all__ = ["INSTEAD", "MIXED", "Module", "Path", "Wrap", "mixed", "own_parts"]

MIXED = "mixed_0"  # the instance of `mixed`
LOW_RANK = "low rank"
FROZEN = ("embeddings", "encoder")  # of the base: what all rows share, except for vectors
ROW = jax.ShapeDtypeStruct((1, 8), "int32")  # on which modules are tried
INSTEAD = "serve it by itself with jpeft.predict"

Path = tuple[str, ...]
Wrap = Callable[[Any, Site, Call, tuple[Any, ...], Context], Any]


class Module(NamedTuple):
    """A module at one site.

    Attributes:
      site: its path.
      kind: modules of one kind have leaves of one structure; those of factors may differ in rank.
      wrap: does the same for all modules of the kind.
      leaves: its leaves; with zeros in their place `wrap` does nothing.
    """

    site: str
    kind: str
    wrap: Wrap
    leaves: dict[str, Any]


def own_parts(name: str, saved: Saved, base: Saved, known: Collection[str]) -> tuple[dict[Path, Array], list[Module]]:
    """What a task has of its own: its row of the stacks without modules, and modules in the order in which they act.

    Args:
      name: of the task.
      saved: the task.
      base: another task, for what all share.
      known: kinds that were mixed before, and need not be tried.

    Raises:
      UserError: if the task cannot be mixed with others on this base.
    """
    leaves = fold(saved.transform, saved.variables["peft"])
    named, params = instances(saved.transform), saved.variables["params"]
    own = _different(name, saved, base)
    for instance, member in named.items():
        if member.wrap is None:
            assert member.merge is not None
            before, params = flatten(params), member.merge(leaves[instance], params)
            changed = {path: x for path, x in flatten(params).items() if x is not before[path]}
            if any(path[0] in FROZEN and x.ndim > 1 for path, x in changed.items()):
                raise _refusal(name, member, "rewrites weights of the base in the forward pass")
            own |= changed
    wraps = [(instance, member) for instance, member in named.items() if member.wrap is not None]
    config = saved.model.config
    modules = [module for instance, member in wraps for module in _modules(name, member, leaves[instance], config)]
    if not {LOW_RANK, *known}.issuperset(module.kind for module in modules):
        _try(saved, modules)
    return {("params", *path): x for path, x in own.items()}, modules


@functools.lru_cache(maxsize=16)
def _sites(config: BertConfig) -> Sites:
    return sites(Bert(config), ROW, ROW, ROW)


def _different(name: str, saved: Saved, base: Saved) -> dict[Path, Array]:
    """The parameters that a task does not share with the base: its head, and a pooler that trained.

    Raises:
      UserError: if they are not on this base.
    """
    if saved.identity.get("fingerprint") == fingerprint({}):
        raise UserError(f"task {name!r} cannot be mixed with others: full trains all weights of the base: {INSTEAD}")
    ours, theirs = flatten(base.variables["params"]), flatten(saved.variables["params"])
    same = [
        (dataclasses.replace(x.model.config, num_labels=1, remat=False), x.identity.get("tokenizer"))
        for x in (base, saved)
    ]
    own = {path: x for path, x in theirs.items() if path[0] in Bert.HEAD or not _equal(x, ours.get(path))}
    if same[0] != same[1] or any(path[0] in FROZEN for path in own):
        raise UserError(f"task {name!r} has another base than the tasks before it: {INSTEAD}")
    return own


def _equal(x: Any, y: Any) -> bool:
    """Whether two parameters are equal, quantised kernels by their codes."""
    if x is y:
        return True
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(a.shape == b.shape and bool(jnp.array_equal(a, b)) for a, b in pairs)


def _refusal(name: str, member: Transform, why: str) -> UserError:
    return UserError(f"task {name!r} cannot be mixed with others: {member.name} {why}: {INSTEAD}")


def _modules(name: str, member: Transform, leaves: Leaves, config: BertConfig) -> list[Module]:
    """The modules of one instance, site by site."""
    if member.reads_params:
        raise _refusal(name, member, "computes with weights of the base in the forward pass")
    shared, made = leaves.get(SHARED, {}), []
    for path, own in leaves.items():
        if path == SHARED:
            continue
        if member.factors is not None:
            made.append(Module(path, LOW_RANK, _low_rank, dict(zip("ab", member.factors(path, own), strict=True))))
        elif path.split("/")[0] in Bert.HEAD:
            raise _refusal(name, member, "acts on the head, which differs from task to task")
        else:
            on = {"on": jnp.ones((), bool), "own": own, "shared": shared}
            made.append(Module(path, _kind(member, own, shared, _sites(config)[path]), _switched(name, member), on))
    return made


def _kind(member: Transform, own: Leaves, shared: Leaves, site: Site) -> str:
    """What a wrap computes at a site, as text: the names of its leaves and its program, with all constants in it."""
    assert member.wrap is not None
    wrap = member.wrap

    def run(own: Leaves, shared: Leaves, args: tuple[Array, ...], mask: Array) -> Any:
        def call(*given: Array) -> Any:  # stands for the site: reads all that it is given
            total = sum(x.sum() for x in given)
            return jax.tree.map(lambda x: jnp.full(x.shape, total, x.dtype), site.out)

        return wrap(own, site, call, args, Context(False, None, mask, {}, shared))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (own, shared))
    program = jax.jit(run, keep_unused=True).lower(*shapes, site.args, ROW).as_text()
    return f"{jax.tree.structure(shapes)}\n{program}"


def _try(saved: Saved, modules: Sequence[Module]) -> None:
    """Traces the modules of one task on one row, so that a wrap which cannot be switched off says so."""
    levels: dict[str, list[Wrap]] = defaultdict(list)
    leaves: dict[str, dict[str, Any]] = defaultdict(dict)
    for module in modules:
        leaves[module.site][str(len(levels[module.site]))] = module.leaves
        levels[module.site].append(module.wrap)

    def run(params: Any, leaves: Leaves, ids: Array) -> Any:
        return apply(saved.model, mixed(levels), {"params": params, "peft": {MIXED: leaves}}, ids, ids, mask=ids)[0]

    jax.eval_shape(run, saved.variables["params"], dict(leaves), ROW)


def mixed(levels: Mapping[str, Sequence[Wrap]]) -> Transform:
    """The transform with the levels of every site; its leaves are {site: {level: leaves}}."""

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Any:
        for i, level in enumerate(levels[site.path]):
            call = _around(level, leaves[str(i)], site, call, ctx)
        return call(*args)

    return Transform("mixed", lambda key, sites, params: {}, wrap)


def _around(wrap: Wrap, leaves: Leaves, site: Site, call: Call, ctx: Context) -> Call:
    return lambda *args: wrap(leaves, site, call, args, ctx)


def _low_rank(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Array:
    del site, ctx
    x, *rest = args
    y, a, b = call(x, *rest), leaves["a"], leaves["b"]
    return y + ((flat(x, len(a)).astype(y.dtype) @ a.astype(y.dtype)) @ b.astype(y.dtype)).reshape(y.shape)


def _switched(name: str, member: Transform) -> Wrap:
    """The wrap of a member with a switch, the leaf "on": where it is off, the site does what it does without."""
    assert member.wrap is not None
    inside = member.wrap

    def wrap(leaves: Leaves, site: Site, call: Call, args: tuple[Array, ...], ctx: Context) -> Any:
        plain: list[Any] = []

        # Switching what the site reads, too, spares a second run of it: where it is off, its output is the plain one.
        def switched(*given: Any) -> Any:
            if _shapes(given) != _shapes(args):
                return call(*given)
            plain.append(call(*_switch(leaves["on"], given, args)))
            return plain[-1]

        out = inside(leaves.get("own", {}), site, switched, args, ctx._replace(shared=leaves.get("shared", {})))
        off = plain[-1] if plain else call(*args)
        if _shapes(out) != _shapes(off):
            raise _refusal(name, member, "changes the length of rows")
        return _switch(leaves["on"], out, off)

    return wrap


def _switch(on: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: x if x is y else jnp.where(on, x, y), new, old)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)
