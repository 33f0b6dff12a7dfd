"""A model with its modules as one StableHLO program and its weights: runs wherever JAX does, without jpeft.

The program is what `jax.export` serialises. It takes any number of rows of any length up to that of the training, on
CPU, CUDA or TPU, so it serves what cannot be folded into a plain model.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jpeft.core import files
from jpeft.core.errors import UserError, one_line
from jpeft.core.hook import apply
from jpeft.core.transform import merge
from jpeft.core.tree import empty_paths, flatten, unflatten
from jpeft.models.pretrained import write_tokenizer
from jpeft.store.modules import Saved

__all__ = ["PLATFORMS", "PROGRAM", "WEIGHTS", "read", "write"]

PROGRAM, WEIGHTS = "model.stablehlo", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")

Program = Callable[[Array, Array, Array], Array]


def write(folder: Path, saved: Saved) -> None:
    """Writes the program, the weights that it takes and the tokenizer. What can be merged is merged first.

    Args:
      folder: made if need be.
      saved: from `jpeft.load`.

    Raises:
      UserError: if `flatbuffers`, which `jax.export` writes with, is not installed.
    """
    merged = merge(saved.transform, saved.variables["peft"], saved.variables["params"])
    variables = {"params": merged.params, "peft": merged.leaves}
    flat, empty = flatten(variables), empty_paths(variables)
    weights = {":".join(path): np.asarray(x) for path, x in flat.items()}

    def program(weights: Mapping[str, Array], ids: Array, mask: Array, types: Array) -> Array:
        """Logits, as `jpeft.predict` computes them."""
        whole = unflatten({tuple(name.split(":")): x for name, x in weights.items()} | {path: {} for path in empty})
        return apply(saved.model, merged.transform, whole, ids, mask, types, mask=mask, train=False)[0]

    longest = min(saved.max_length, saved.model.config.max_length)
    rows, tokens = export.symbolic_shape("rows, tokens", constraints=[f"tokens <= {longest}"])
    given = jax.ShapeDtypeStruct((rows, tokens), np.int32)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(shapes, given, given, given)
    try:
        packed = exported.serialize()
    except ImportError:
        raise UserError("a StableHLO program is written with flatbuffers: pip install 'jpeft[stablehlo]'") from None
    write_tokenizer(Path(saved.base), folder)
    files.write_safetensors(folder / WEIGHTS, weights, {"format": "pt"})
    (folder / PROGRAM).write_bytes(packed)


def read(folder: Path) -> Program:
    """The function from token ids, mask and segment ids, int32 [rows, tokens] each, to float32 logits [rows, labels].

    Raises:
      UserError: if the folder is not as `write` wrote it.
    """
    folder = Path(folder)
    for name in (PROGRAM, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no StableHLO program: expected {PROGRAM} and {WEIGHTS}")
    try:
        exported = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception as error:  # whatever flatbuffers and MLIR raise
        raise UserError(f"{folder / PROGRAM} is not a program of jax.export: {one_line(error):.120}") from None
    tensors, _ = files.read_safetensors(folder / WEIGHTS)
    weights, call = jax.tree.map(jnp.asarray, tensors), jax.jit(exported.call)
    return lambda ids, mask, types: call(weights, ids, mask, types)
