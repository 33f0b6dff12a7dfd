"""UniPELT: a prefix, an adapter and LoRA, each behind a gate (Mao et al. 2021, arXiv:2110.07577)."""

from collections.abc import Sequence

from jpeft.core.errors import UserError, nearest
from jpeft.core.transform import Chain, chain
from jpeft.transforms.lora import lora
from jpeft.transforms.pfeiffer import pfeiffer
from jpeft.transforms.prefix import prefix

__all__ = ["unipelt"]

VARIANTS = ("apl", "ap")


def unipelt(
    variant: str = "apl",
    num_virtual_tokens: int = 10,
    mlp_hidden: int | None = 512,
    reduction_factor: float = 16,
    rank: int = 8,
    layers: Sequence[int] | None = None,
) -> Chain:
    """A prefix, a Pfeiffer adapter and LoRA in every layer, each behind a gate that reads the input.

    Mao et al. 2021, arXiv:2110.07577; reference: morningmoni/UniPELT. Each gate is the mean over an example's real
    tokens of sigmoid(linear(x)); LoRA's replaces alpha / rank. Gates read the input, so nothing can be merged; `fold`
    drops the prefix's MLP. At inference it costs as much as its parts.

    Args:
      variant: "apl" has all three, "ap" all but LoRA.
      num_virtual_tokens: of the prefix.
      mlp_hidden: of the prefix's reparametrisation; None for none.
      reduction_factor: of the adapter.
      rank: of LoRA.
      layers: only in these layers; None means all.

    Returns:
      The chain of prefix, adapter and LoRA, with their leaves.

    Raises:
      UserError: if the variant is unknown or a size is out of range.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r} is unknown: {nearest(variant, VARIANTS)}")
    parts = [
        prefix(num_virtual_tokens, mlp_hidden, layers, gate=True),
        pfeiffer(reduction_factor=reduction_factor, layers=layers, gate=True),
        lora(rank, layers=layers, gate=True),
    ]
    return chain(*parts[: len(variant)])
