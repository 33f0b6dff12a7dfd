"""A model with its modules as one ONNX file, for ONNX Runtime and what else reads it: needs neither jpeft nor JAX.

The file is what `jax2onnx` makes of the forward pass. Like a StableHLO program it takes any number of rows of any
length up to that of the training, and serves what cannot be folded into a plain model, as far as `jax2onnx` can.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array, export
from jax.extend.core import jaxpr_as_fun

from jpeft.core.errors import UserError, one_line
from jpeft.core.hook import apply
from jpeft.core.transform import instances, merge
from jpeft.models.pretrained import write_tokenizer
from jpeft.store.modules import Saved

__all__ = ["INPUTS", "PROGRAM", "read", "write"]

PROGRAM = "model.onnx"
INPUTS, OUTPUT = ("input_ids", "attention_mask", "token_type_ids"), "logits"
TOLERANCE = 1e-4  # of a logit: the two sum up in other orders
MISSING = "ONNX files are written with jax2onnx and read with onnxruntime: pip install 'jpeft[onnx]'"

Program = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def write(folder: Path, saved: Saved) -> None:
    """Writes the program and the tokenizer. What can be merged is merged first.

    The file's inputs are `INPUTS`, int32 [rows, tokens] each, and its output "logits", float32 [rows, labels]. Large
    weights lie beside it, in `model.onnx.data`. Before anything is written, it is run and held against JAX.

    Args:
      folder: made if need be.
      saved: from `jpeft.load`.

    Raises:
      UserError: if `jax2onnx` is not installed, cannot convert the modules, or converts them into something else.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(MISSING) from None
    merged = merge(saved.transform, saved.variables["peft"], saved.variables["params"])
    variables = {"params": merged.params, "peft": merged.leaves}

    def program(ids: Array, mask: Array, types: Array) -> Array:
        """Logits, as `jpeft.predict` computes them."""
        return apply(saved.model, merged.transform, variables, ids, mask, types, mask=mask, train=False)[0]

    longest = min(saved.max_length, saved.model.config.max_length)
    rows, tokens = export.symbolic_shape("rows, tokens", constraints=[f"tokens <= {longest}"])
    given = [jax.ShapeDtypeStruct((rows, tokens), np.int32)] * len(INPUTS)
    # While it traces, jax2onnx has functions of its own in the place of JAX's and flax's, which interceptors do not
    # see: it gets the program traced.
    traced = jaxpr_as_fun(jax.make_jaxpr(program)(*given))
    names: dict[str, Any] = {"input_names": INPUTS, "output_names": [OUTPUT], "model_name": saved.task}
    with tempfile.TemporaryDirectory() as aside:
        made = Path(aside) / PROGRAM
        try:
            with _quiet():
                jax2onnx.to_onnx(lambda *args: traced(*args)[0], given, return_mode="file", output_path=made, **names)
            difference = _difference(_opened(made), program, longest, saved.model.config.vocab_size)
        except Exception as error:  # whatever a converter and a runtime raise
            modules, why = " and ".join(instances(merged.transform)) or "the model", one_line(error)
            raise UserError(f"jax2onnx cannot convert {modules}: export --format stablehlo ({why:.160})") from None
        if not difference <= TOLERANCE:
            raise UserError(f"jax2onnx made a model with other logits, by {difference:.1e}: export --format stablehlo")
        write_tokenizer(Path(saved.base), folder)
        for file in Path(aside).iterdir():
            shutil.copyfile(file, folder / file.name)


def _difference(run: Program, program: Callable[..., Array], longest: int, vocabulary: int) -> float:
    """The largest difference of a logit on random rows, relative where logits are large."""
    rng, tokens = np.random.default_rng(0), min(7, longest)
    ids = rng.integers(0, vocabulary, (3, tokens), np.int32)
    mask = np.array(np.arange(tokens)[None] < np.array([[tokens], [1], [(tokens + 1) // 2]]), np.int32)
    given = (ids, mask, np.zeros_like(ids))
    wanted = np.asarray(jax.jit(program)(*given))
    return float(np.abs(run(*given) - wanted).max() / (1 + np.abs(wanted).max()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about shapes that have no names in the file, hundreds of which say nothing to a user."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def read(folder: Path) -> Program:
    """The function from token ids, mask and segment ids, int32 [rows, tokens] each, to float32 logits [rows, labels].

    Raises:
      UserError: if `onnxruntime` is not installed, or the folder is not as `write` wrote it.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(MISSING) from None
    del onnxruntime
    if not (folder / PROGRAM).is_file():
        raise UserError(f"{folder} holds no ONNX file: expected {PROGRAM}")
    try:
        return _opened(folder / PROGRAM)
    except Exception as error:  # whatever the runtime raises
        raise UserError(f"{folder / PROGRAM} is not an ONNX file: {one_line(error):.120}") from None


def _opened(file: Path) -> Program:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(*given: np.ndarray) -> np.ndarray:
        (logits,) = session.run([OUTPUT], dict(zip(INPUTS, (np.asarray(x, np.int32) for x in given), strict=True)))
        return np.asarray(logits)

    return run
