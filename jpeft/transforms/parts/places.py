"""The kinds of sites for methods, recognised by the arguments and outputs of their calls, for any linen model."""

from collections.abc import Callable, Sequence
from typing import Any

from jpeft.core.site import Site, Sites, find

__all__ = [
    "find_cores",
    "find_encoders",
    "find_feed_forward",
    "find_inputs",
    "find_norms",
    "find_residual",
    "find_with_params",
    "own_parameters",
]

Layers = Sequence[int] | None


def find_residual(sites: Sites, targets: str, layers: Layers = None) -> tuple[Site, ...]:
    """Sites that map (hidden [..., d], residual [..., d]) to [..., d], for adapters; see `jpeft.find`."""
    fits = _takes(2, lambda hidden, residual, out: hidden == residual == out and len(hidden) > 1)
    return find(sites, targets, layers, fits, "sites with arguments (hidden, residual)")


def find_feed_forward(sites: Sites, targets: str, layers: Layers = None) -> tuple[Site, ...]:
    """Sites that map one array [..., d] to another, for parallel adapters."""
    fits = _takes(1, lambda x, out: x == out and len(x) > 1)
    return find(sites, targets, layers, fits, "sites that map [..., d] to [..., d]")


def find_cores(sites: Sites, targets: str, layers: Layers = None) -> tuple[Site, ...]:
    """Sites around attention, with heads before time."""
    fits = _takes(5, lambda hidden, q, k, v, mask, out: len(q) == len(k) == 4 and k == v and q == out)
    return find(sites, targets, layers, fits, "sites with arguments (hidden, query, key, value, mask)")


def find_inputs(sites: Sites, targets: str) -> tuple[Site, ...]:
    """Sites around the inputs of a model's embeddings."""
    fits = _takes(4, lambda words, types, places, mask, *out: len(words) == 3 and types == places == mask == words[:2])
    return find(sites, targets, None, fits, "sites with arguments (word vectors, token types, positions, mask)")


def find_encoders(sites: Sites, targets: str) -> tuple[Site, ...]:
    """Sites around a whole encoder."""

    def fits(site: Site) -> bool:
        hidden, mask = _shapes(site.args[:2]) if len(site.args) == 2 else ((), ())
        out = _shapes(site.out)[0] if isinstance(site.out, tuple) else None
        return len(hidden) == 3 and mask == hidden[:2] and out == hidden

    return find(sites, targets, None, fits, "sites with arguments (hidden, mask)")


def find_norms(sites: Sites, targets: str, layers: Layers = None) -> tuple[Site, ...]:
    """Normalisation layers with their own parameters, outside the head."""

    def fits(site: Site) -> bool:
        return "Norm" in site.kind and bool(own_parameters(site)) and not site.head

    return find(sites, targets, layers, fits, "normalisation layers")


def find_with_params(sites: Sites, targets: str, layers: Layers = None) -> tuple[Site, ...]:
    """Sites with their own parameters, outside the head, which always trains under its own name."""

    def fits(site: Site) -> bool:
        return bool(own_parameters(site)) and not site.head

    return find(sites, targets, layers, fits, "sites with their own parameters, outside the head")


def own_parameters(site: Site) -> tuple[str, ...]:
    """The names of the arrays that belong to a site itself, not to a module inside it."""
    return tuple(name for name, x in site.params.items() if hasattr(x, "shape"))


def _takes(num_args: int, related: Callable[..., bool]) -> Callable[[Site], bool]:
    """Whether a site takes this many arrays, and related(*shapes of its arguments, *shapes of its outputs)."""

    def fits(site: Site) -> bool:
        if len(site.args) != num_args or site.out is None:
            return False
        shapes = (*_shapes(site.args), *_shapes(site.out if isinstance(site.out, tuple) else (site.out,)))
        return None not in shapes and related(*shapes)

    return fits


def _shapes(arrays: Any) -> list[Any]:
    """The shape of each, or None if it is not an array."""
    return [getattr(x, "shape", None) for x in arrays]
