"""Fine-tuning in few dimensions: structure-aware intrinsic dimension (Aghajanyan et al. 2020, arXiv:2012.13255).

The map from few dimensions to many is Fastfood (Le et al. 2013, arXiv:1408.3060). Its random numbers are recomputed
from a stored seed in every forward pass, with plain Threefry (Salmon et al. 2011): saved modules must give the same
numbers in every version of JAX, which `jax.random` does not promise.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry_2x32

from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.site import Site, Sites, find, layer_of, stack_of
from jpeft.core.transform import FIXED, SHARED, Leaves, Params, Transform, site_key
from jpeft.transforms.parts.linear import sizes

__all__ = ["fastfood", "hadamard", "said"]


def said(
    intrinsic_dim: int = 1000,
    layer_wise: bool = True,
    targets: str = "query|value",
    layers: Sequence[int] | None = None,
) -> Transform:
    """theta = theta_0 + lambda_layer Fastfood(d): one trained vector d moves every parameter of the targets.

    d [intrinsic_dim] starts at 0, so a fresh SAID changes nothing, and each layer's lambda at 1. Each parameter tensor
    has its own projection, scaled so that the tensor changes by about |d|. It is merged inside the forward pass: every
    training step recomputes all D weights of the targets, in O(D log D); with the gradient, this takes about 0.1 s for
    [768, 768] on two CPU cores. `merge` does it once; after that inference costs nothing.

    A target is a site with everything below it. The paper moves the whole model, `targets=r"embeddings|layer_\\d+"`,
    which is only practical on accelerators; the default moves kernels and biases of LoRA's targets. Only d, the lambdas
    and a seed for each target are saved.

    Args:
      intrinsic_dim: the length of d.
      layer_wise: whether there are lambdas, one per layer and one for everything outside the layers (the paper's
        SAID); without them it is the paper's DID.
      targets: pattern of the sites whose parameters move, see `jpeft.find`; a site below another target counts once.
      layers: only in these layers; None means all.

    Returns:
      A transform with leaves {"shared": {"d": [intrinsic_dim], "lambda": {"encoder/layer_0": [], ..., "outside": []}},
      path: {"fixed": {"seed": uint32 []}}}.

    Raises:
      UserError: if the size is out of range; in `init`, if a target is missing or has no parameters.
    """
    sizes(intrinsic_dim=intrinsic_dim)

    def init(key: Array, sites: Sites, params: Params | None) -> Leaves:
        del params
        found = find(sites, targets, layers)
        paths = {site.path for site in found}
        chosen = [site for site in found if paths.isdisjoint(_above(site.path))]
        shared: Leaves = {"d": jnp.zeros(intrinsic_dim)}
        if layer_wise:
            shared["lambda"] = {_group(site.path): jnp.ones(()) for site in chosen}
        # For whole parameters, possibly stacked by a scan: they are moved before the forward pass.
        return {SHARED: shared, **{site.path: _seed(site_key(key, site.path), site) for site in chosen}}

    def merge(leaves: Leaves, params: Params) -> Params:
        d, lambdas = leaves[SHARED]["d"], leaves[SHARED].get("lambda")
        for path, own in leaves.items():
            if path != SHARED:
                factor = lambdas[_group(path)] if lambdas else 1.0

                def moved(subtree: Params, seed: Array = own[FIXED]["seed"], factor: Array | float = factor) -> Params:
                    flat = tree.flatten(subtree)
                    return tree.unflatten(
                        {name: x + factor * fastfood(d, seed, "/".join(name), x.shape) for name, x in flat.items()}
                    )

                params = tree.replace(params, path, moved)
        return params

    return Transform("said", init, None, merge, needs_float32=True)


@functools.partial(jax.jit, static_argnames=("name", "shape"))  # traced once for all tensors of one shape
def fastfood(d: Array, seed: Array, name: str, shape: tuple[int, ...]) -> Array:
    """H G P H B d, cut to D entries and scaled by 1 / sqrt(D sum(G^2)): a random linear map that nearly keeps the norm.

    H is the Hadamard matrix of size n, the smallest power of two that fits both D and d; B are random signs, P is a
    permutation and G are standard normal. The reference implementation samples P uniformly, by a sort that would take
    most of the time; this P mixes with multiplications and shifts.

    Args:
      d: the vector to map, padded with zeros to [n].
      seed: uint32 []; together with `name`, it determines B, P and G.
      name: the name of the parameter; see `seed`.
      shape: of the result, with D entries.

    Returns:
      The image of d, in the given shape.
    """
    size = math.prod(shape)
    n = 1 << max((max(size, d.size) - 1).bit_length(), 1)
    key = jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.asarray(zlib.crc32(name.encode()), jnp.uint32)])
    signs, g, mixers = jnp.split(threefry_2x32(key, jnp.arange(2 * n + 16, dtype=jnp.uint32)), [n, 2 * n])
    g = _normal(g)
    x = jnp.pad(d, (0, n - d.size)) * jnp.where(signs >> 31, 1.0, -1.0)
    x = hadamard(x).at[_permutation(mixers, n)].get(unique_indices=True, mode="promise_in_bounds")
    return (hadamard(x * g)[:size] / jnp.sqrt(size * jnp.sum(g**2))).reshape(shape)


def hadamard(x: Array) -> Array:
    """The Hadamard matrix (Sylvester's, of ones and minus ones) times x [n], n = 2, 4, 8, ..., in n log2(n) additions.

    Each step combines the two halves, whose indices differ in the highest bit, and makes it the lowest bit. All steps
    are the same, and after log2(n) of them every bit has been combined and is back in its place.
    """

    def step(_: int, x: Array) -> Array:
        low, high = x.reshape(2, -1)
        return jnp.stack([low + high, low - high], axis=-1).reshape(-1)

    return jax.lax.fori_loop(0, x.size.bit_length() - 1, step, x)


def _permutation(mixers: Array, n: int) -> Array:
    """A permutation of 0, ..., n - 1 for n a power of two: each round is one-to-one, and together they mix well."""
    bits = n.bit_length() - 1
    index = jnp.arange(n, dtype=jnp.uint32)
    for multiplier, offset in mixers.reshape(-1, 2):
        index = (index * (multiplier | 1) + offset) & (n - 1)
        index ^= index >> max(bits // 2, 1)
    return index


def _normal(bits: Array) -> Array:
    """Standard normal numbers from random uint32s, by the inverse of the distribution function."""
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) / 2**22 - 1  # in (-1, 1), exact in float32
    return math.sqrt(2) * jax.lax.erf_inv(uniform)


def _seed(key: Array, site: Site) -> Leaves:
    if not jax.tree.leaves(site.params):
        raise UserError(f"site {site.path!r} is a {site.kind} without parameters: choose sites that have some")
    return {FIXED: {"seed": jax.random.bits(key, (), jnp.uint32)}}


def _group(path: str) -> str:
    """The name of the lambda of a site."""
    layer = layer_of(path)
    return "outside" if layer is None else f"{stack_of(path)}_{layer}"


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
