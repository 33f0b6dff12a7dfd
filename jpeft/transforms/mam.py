"""Mix-and-match: a prefix and parallel adapters (He et al. 2021, arXiv:2110.04366)."""

from collections.abc import Sequence

from jpeft.core.transform import Chain, chain
from jpeft.transforms.parallel import parallel
from jpeft.transforms.prefix import prefix

__all__ = ["mam"]


def mam(
    num_virtual_tokens: int = 30,
    mlp_hidden: int | None = 800,
    bottleneck: int = 512,
    scale: float = 4.0,
    layers: Sequence[int] | None = None,
) -> Chain:
    """Mix-and-match: a prefix, and a parallel adapter at each feed-forward (He et al. 2021, arXiv:2110.04366).

    At inference it costs as much as its parts. Nothing can be merged; `fold` drops the prefix's MLP.

    The sizes are AdapterHub's, which are the authors' for summaries. On GLUE they take 16 tokens, a bottleneck of 16
    and a scale of 2 (jxhe/unify-parameter-efficient-tuning), and the rate that is a run's default here, 1e-4. Very
    short runs on short texts need a short prefix (docs/methods.md).

    Args:
      num_virtual_tokens: of the prefix.
      mlp_hidden: of the prefix's reparametrisation; None for none.
      bottleneck: of the adapters.
      scale: of the adapters.
      layers: only in these layers; None means all.

    Returns:
      The chain of prefix and parallel adapter, with their leaves.

    Raises:
      UserError: if a size is out of range.
    """
    return chain(prefix(num_virtual_tokens, mlp_hidden, layers), parallel(bottleneck, scale=scale, layers=layers))
