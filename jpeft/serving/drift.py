"""What an export changed: the exported model read back, and held against the run's own logits."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.core.quantised import holds_quantised
from jpeft.core.transform import Chain
from jpeft.core.tree import union
from jpeft.data.batching import Batch
from jpeft.data.kinds import KINDS
from jpeft.models import Bert, BertConfig, pretrained
from jpeft.plans.plan import build
from jpeft.run import experiment, loading, workdir
from jpeft.run.console import Console
from jpeft.store import adapterhub, huggingface, onnx, stablehlo
from jpeft.store.modules import Saved
from jpeft.training import step
from jpeft.training.compiled import Compiled
from jpeft.training.loop import evaluate

__all__ = ["DTYPES", "Drift", "measure"]

DTYPES = ("float32", "bfloat16")


class Drift(NamedTuple):
    """How the exported model differs from the run's own float32 logits on the evaluation split.

    Attributes:
      dtype: that the exported model computes in.
      largest: difference of a logit.
      changed: rows, of tagging words, with another answer; of a regression, None.
      rows: of the split; of tagging, its words.
    """

    dtype: str
    largest: float
    changed: int | None
    rows: int


def measure(folder: Path, form: str, output: Path, saved: Saved, console: Console) -> list[Drift]:
    """The drift on the evaluation split by dtype; nothing, and a warning, if its data cannot be found.

    Args:
      folder: of the modules, in the workdir of their run.
      form: that they were exported as, a key of `READERS`.
      output: where to.
      saved: what `folder` holds.
      console: shows what is found.
    """
    run, predictions = folder.parents[1], folder.parent / experiment.PREDICTIONS
    try:
        config = workdir.read_config(run)
        data, _, inputs = loading.load(config, Console(quiet=True))
        workdir.check(files.read_record(run / workdir.INPUTS, workdir.INPUTS_KIND), inputs, run)
        expected = np.asarray(files.read_leaves(predictions)["logits"])
    except UserError as error:
        console.warn(f"what changed on the evaluation split was not measured: {error}")
        return []
    found = []
    for dtype, opened in READERS[form](output, saved).items():
        logits = evaluate(opened, {}, {}, data.dev, data.eval_buckets)
        decide = KINDS[saved.kind].decide
        differs = (decide(logits) != decide(expected)).reshape(len(expected), -1).any(1)
        changed = int(differs.sum()) if saved.labels else None
        found.append(Drift(dtype, float(np.abs(logits - expected).max()), changed, len(expected)))
        of = "" if changed is None else f", {changed} of {len(expected):,} answers"
        console.say(f"  in {dtype}, the exported model differs by at most {found[-1].largest:.1e} in a logit{of}")
    return found


Opened = dict[str, Callable[[Any, Any, Batch], Any]]  # by dtype, what gives the logits of a batch


def _read_merged(output: Path, saved: Saved) -> Opened:
    by_token = KINDS[saved.kind].by_token
    loaded = pretrained.load(output, num_labels=len(saved.labels) or 1, key=jax.random.key(0), by_token=by_token)
    return _opened(saved, build([]), {"params": loaded.params, "peft": {}})


def _read_peft(output: Path, saved: Saved) -> Opened:
    return _with_modules(saved, huggingface.read(output, saved.model.config))


def _read_adapters(output: Path, saved: Saved) -> Opened:
    return _with_modules(saved, adapterhub.read(output, saved.model.config))


def _with_modules(saved: Saved, modules: huggingface.Modules) -> Opened:
    base = saved.variables["params"]
    if holds_quantised(base):  # which the other library does not have: it puts the modules on the float32 weights
        base = _read_base(saved)
    params = union(base, modules.params)
    return _opened(saved, build(modules.spec), {"params": params, "peft": jax.tree.map(jnp.asarray, modules.leaves)})


def _read_base(saved: Saved) -> dict[str, Any]:
    num_labels, by_token = len(saved.labels) or 1, KINDS[saved.kind].by_token
    return pretrained.load(saved.base, num_labels=num_labels, key=jax.random.key(0), by_token=by_token).params


def _opened(saved: Saved, transform: Chain, variables: dict[str, Any]) -> Opened:
    def of(dtype: str) -> Callable[[Any, Any, Batch], Any]:
        model = Bert(BertConfig(**{**vars(saved.model.config), "dtype": dtype}))
        run = Compiled(step.eval_step(model, transform), 2)
        return lambda _, __, batch: run(variables, {"params": {}, "peft": {}}, batch)

    return {dtype: of(dtype) for dtype in DTYPES}


def _read_program(library: Any, output: Path, saved: Saved) -> Opened:
    program, dtype = library.read(output), saved.model.config.dtype
    return {dtype: lambda _, __, batch: program(batch.input_ids, batch.attention_mask, batch.token_type_ids)}


READERS: Mapping[str, Callable[[Path, Saved], Opened]]
READERS = {"hf": _read_merged, "peft": _read_peft, "adapters": _read_adapters}
READERS |= {"stablehlo": partial(_read_program, stablehlo), "onnx": partial(_read_program, onnx)}
