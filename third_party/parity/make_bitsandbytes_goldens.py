"""Writes tests/golden/bitsandbytes.{json,safetensors}: what bitsandbytes makes of given weights, in codes and back.

    python third_party/parity/make_bitsandbytes_goldens.py

Environment: requirements-bitsandbytes.txt beside this file; its operators for CPU, so no accelerator is needed.

The weights, [out, in] as in PyTorch, are not stored: `weight` below makes them, and so does the test. For each kind of
codes and weight the golden holds `KIND_SIZE/codes`, `KIND_SIZE/absmax`, of 4-bit kinds `KIND_SIZE/{nested, mean}`, and
`KIND_SIZE/values`, the first and last rows of the dequantised weight. The large weight has more than 256 blocks, so two
groups of absmaxes, and a last block that is not full.
"""

import importlib.metadata
import json
import pathlib

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
SHAPES = {"small": (7, 50), "large": (37, 450)}
CASES = (("nf4", "small"), ("nf4", "large"), ("fp4", "small"), ("int8", "small"))


def weight(shape: tuple[int, int]) -> np.ndarray:
    """Values of both signs and many sizes, exact in float32 on every machine."""
    i = np.arange(shape[0] * shape[1], dtype=np.int64)
    uniform = (i * 40503 % 65536 - 32768) / 32768
    return (uniform**3 * (1 + i // 64 % 7) / 8).astype(np.float32).reshape(shape)


def coded(kind: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    if kind == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(w)
        return {"codes": codes, "absmax": absmax, "values": bnb.int8_vectorwise_dequant(codes, absmax)}
    codes, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type=kind)
    scales = {"absmax": state.absmax, "nested": state.state2.absmax, "mean": state.offset.reshape(1)}
    return {"codes": codes.reshape(-1), **scales, "values": bnb.dequantize_4bit(codes, state)}


def main() -> None:
    tensors = {}
    for kind, size in CASES:
        for name, x in coded(kind, torch.tensor(weight(SHAPES[size]))).items():
            tensors[f"{kind}_{size}/{name}"] = (x[[0, -1]] if name == "values" else x).contiguous()
    save_file(tensors, GOLDEN / "bitsandbytes.safetensors")
    versions = {name: importlib.metadata.version(name) for name in ("bitsandbytes", "torch")}
    text = json.dumps({"versions": versions, "shapes": SHAPES, "cases": CASES}, indent=2)
    (GOLDEN / "bitsandbytes.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
