"""Quantises kernels: NF4 and FP4 in blocks with double quantisation, int8 by output.

All of it is NumPy on the host: the codes are the same on every machine, whatever it trains on, so a module knows its
quantised base again by a hash.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import tree
from jpeft.core.errors import UserError, nearest
from jpeft.core.quantised import BLOCK, BOOKS, DYNAMIC, KINDS, NESTED, Quantised
from jpeft.core.site import ALL, Site, Sites, find, matches, stack_axes
from jpeft.core.transform import Params

__all__ = ["quantise"]

TINY = np.float32(1e-38)  # stands for the absmax of a block of zeros


def quantise(
    params: Params, sites: Sites, kind: str = "nf4", targets: str = ALL, exceptions: str | None = None
) -> dict[str, Any]:
    """The parameters with kernels in codes: the base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

        params = jpeft.quantise(params, sites, "nf4")  # an eighth of the memory; everything else stays as it was

    "nf4" and "fp4" take blocks of 64 values, 4 bits each, with their absmax in 8 bits (double quantisation), which is
    0.129 of float32; "int8" takes 8 bits a value and one float32 an output, with zero at zero. `jpeft.apply`
    dequantises a kernel where its layer is called, and again in the backward pass: no dense copy is kept. Any method
    trains on top; those that change kernels themselves (FISH, SAID, the top layers) keep dense copies of those.
    `jpeft.merge` gives dense weights.

    Args:
      params: the parameters of the model; not edited.
      sites: its sites, from `jpeft.sites`.
      kind: "nf4", "fp4" or "int8".
      targets: pattern of the layers with a "kernel", see `jpeft.find`. ".*" means those inside the model's layers: not
        its head, nor a pooler.
      exceptions: pattern of targets that stay as they are; None means none.

    Returns:
      A tree like `params`, with a `jpeft.core.quantised.Quantised` in the place of each chosen "kernel".

    Raises:
      UserError: if the kind is unknown, a pattern matches nothing, or a kernel is quantised already, is not finite, or
        is stacked on an axis that is not the first.
    """
    if kind not in KINDS:
        raise UserError(f"cannot quantise as {kind!r:.60}: {nearest(str(kind), KINDS)}")
    for site in _chosen(sites, targets, exceptions):
        old = tree.get(params, f"{site.path}/kernel")
        if isinstance(old, Quantised):
            raise UserError(f"the kernel of site {site.path!r} is quantised already, as {old.kind}")
        new = _quantised(np.asarray(old), kind, len(stack_axes(site)), site)
        params = tree.replace(params, f"{site.path}/kernel", lambda _, new=new: new)
    return dict(params)


def _chosen(sites: Sites, targets: str, exceptions: str | None) -> list[Site]:
    def fits(site: Site) -> bool:
        kernel = site.params.get("kernel")
        inside = targets != ALL or site.layer is not None or bool(site.stack)
        above = any(path.startswith(f"{site.path}/") for path in sites)  # the hook would not reach what is below
        return inside and not above and isinstance(kernel, jax.ShapeDtypeStruct) and len(kernel.shape) > 1

    found = find(sites, targets, None, fits, "layers with a kernel")
    spared = {site.path for site in found if exceptions is not None and matches(exceptions, site.path)}
    if exceptions is not None and not spared:
        raise UserError(
            f"exceptions {exceptions!r} match none of the layers to quantise: "
            f"{nearest(exceptions, dict.fromkeys(site.path.rsplit('/', 1)[-1] for site in found))}"
        )
    return [site for site in found if site.path not in spared]


def _quantised(kernel: np.ndarray, kind: str, depth: int, site: Site) -> Quantised:
    """A kernel, or copies of one along its first `depth` axes, in codes."""
    if not np.isfinite(kernel.astype(np.float32)).all():
        raise UserError(f"the kernel of site {site.path!r} is not finite")
    stack, own = kernel.shape[:depth], kernel.shape[depth:]
    copies = kernel.astype(np.float32).reshape(-1, *own)
    outputs = _outputs(site, own)
    code = (lambda rows: _bytes(rows.reshape(outputs, -1))) if kind == "int8" else (lambda rows: _blocks(rows, kind))
    made = [code(np.ascontiguousarray(copy.T)) for copy in copies]
    codes, *scales = (np.stack(arrays).reshape((*stack, *arrays[0].shape)) for arrays in zip(*made, strict=True))
    return Quantised(jnp.asarray(codes), tuple(map(jnp.asarray, scales)), kind, own, str(kernel.dtype))


def _outputs(site: Site, kernel: tuple[int, ...]) -> int:
    """How many outputs a kernel has: in a DenseGeneral over several axes, their product; else its last axis."""
    x, out = getattr(site.args[0] if site.args else None, "shape", ()), getattr(site.out, "shape", ())
    n = (len(x) - len(out) + len(kernel)) // 2  # axes that it contracts, which are the last ones of x
    general = 0 < n < len(kernel) and x[-n:] == kernel[:n] and out[n - len(kernel) :] == kernel[n:]
    return math.prod(kernel[n:]) if general else kernel[-1]


def _bytes(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes int8 [entries] and the absmax of each row, float32 [rows]."""
    absmax = np.abs(rows).max(1)
    scale = 127 / np.where(absmax > 127 * TINY, absmax, 1)
    return np.rint(rows * scale[:, None]).astype(np.int8).reshape(-1), absmax


def _blocks(values: np.ndarray, kind: str) -> tuple[np.ndarray, ...]:
    """Codes uint8 [blocks * 32], and the three scales, of which the first are codes, too."""
    book = BOOKS[kind]
    order = np.argsort(book, kind="stable")
    codes, absmax = _nearest(values, book[order], BLOCK)
    codes = order.astype(np.uint8)[codes]
    mean = absmax.mean(dtype=np.float64).astype(np.float32)
    nested, scales = _nearest(absmax - mean, DYNAMIC, NESTED)
    return codes[::2] << 4 | codes[1::2], nested[: len(absmax)], scales, mean


def _nearest(values: np.ndarray, book: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The places in a sorted book, uint8 [blocks * size], and the absmax of each block; zeros fill up the last one."""
    padded = np.zeros(math.ceil(values.size / size) * size, np.float32)
    padded[: values.size] = values.reshape(-1)
    blocks = padded.reshape(-1, size)
    absmax = np.abs(blocks).max(1)
    scaled = blocks * (1 / np.maximum(absmax, TINY))[:, None]
    return np.searchsorted((book[:-1] + book[1:]) / 2, scaled.reshape(-1)).astype(np.uint8), absmax
