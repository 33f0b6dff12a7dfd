"""Codes, scales and values are those of bitsandbytes.

The golden comes from third_party/parity/make_bitsandbytes_goldens.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft.core.quantised import dense
from jpeft.core.site import Site

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = load_file(GOLDEN / "bitsandbytes.safetensors")
ABOUT = json.loads((GOLDEN / "bitsandbytes.json").read_text())


def weight(shape):
    """As the script that made the golden has it."""
    i = np.arange(shape[0] * shape[1], dtype=np.int64)
    uniform = (i * 40503 % 65536 - 32768) / 32768
    return (uniform**3 * (1 + i // 64 % 7) / 8).astype(np.float32).reshape(shape)


@pytest.mark.parametrize(("kind", "size"), ABOUT["cases"])
def test_a_kernel_is_quantised_as_bitsandbytes_does(kind, size):
    kernel = weight(ABOUT["shapes"][size]).T
    site = Site("layer_0", 0, "Dense", {"kernel": jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)}, ())
    made = jpeft.quantise({"layer_0": {"kernel": kernel}}, {"layer_0": site}, kind)["layer_0"]["kernel"]
    golden = {name.split("/")[1]: x for name, x in TENSORS.items() if name.startswith(f"{kind}_{size}/")}
    codes = golden["codes"].reshape(-1)
    np.testing.assert_array_equal(np.asarray(made.codes)[: codes.size], codes)
    np.testing.assert_array_equal(made.scales[0], golden["absmax"])
    if kind != "int8":
        np.testing.assert_allclose(made.scales[1], golden["nested"], rtol=1e-6)
        np.testing.assert_allclose(made.scales[2], golden["mean"][0], rtol=1e-6)
    # The last bit: bitsandbytes multiplies in another order, and its 8-bit book has PyTorch's roundings.
    values = np.asarray(dense(made)).T[[0, -1]]
    np.testing.assert_allclose(values, golden["values"], rtol=1e-6, atol=1e-9)
