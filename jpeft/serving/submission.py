"""Answers to GLUE's test sets, in the form in which its server (gluebenchmark.com) takes them: a zip of TSV files."""

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpeft.core.errors import UserError
from jpeft.data import tasks
from jpeft.run import experiment, workdir
from jpeft.run.console import Console
from jpeft.serving.export import find_modules
from jpeft.serving.stream import answering
from jpeft.store import model_folder, modules
from jpeft.store.modules import Saved

__all__ = ["FILES", "File", "submit"]

CHUNK = 2048  # rows between two looks at the bar


class File(NamedTuple):
    """One file of a submission.

    Attributes:
      name: without ".tsv".
      task: whose test set it answers.
      split: of that task.
      rows: that GLUE's test set has.
      named: whether classes are given by name, where others take their numbers.
    """

    name: str
    task: str
    split: str
    rows: int
    named: bool = False

    @property
    def trained(self) -> str:
        """The task whose model answers: AX has no training data, and MNLI's labels."""
        return "mnli" if self.task == "ax" else self.task


FILES = (
    File("CoLA", "cola", "test", 1063),
    File("SST-2", "sst2", "test", 1821),
    File("MRPC", "mrpc", "test", 1725),
    File("QQP", "qqp", "test", 390965),
    File("STS-B", "stsb", "test", 1379),
    File("MNLI-m", "mnli", "test_matched", 9796, named=True),
    File("MNLI-mm", "mnli", "test_mismatched", 9847, named=True),
    File("QNLI", "qnli", "test", 5463, named=True),
    File("RTE", "rte", "test", 3000, named=True),
    File("WNLI", "wnli", "test", 146),
    File("AX", "ax", "test", 1104, named=True),
)


def submit(models: Sequence[Path], output: Path, console: Console, data: str | None = None) -> tuple[str, ...]:
    """Answers the test sets of the tasks that the models were trained on, and writes them all or nothing.

    Args:
      models: `seed_<n>/model` folders, or workdirs, whose best seeds are taken; at most one for each task.
      output: a file that ends in ".zip".
      console: shows what is going on.
      data: a folder with GLUE, as `config.data.path`; None takes that of each workdir.

    Returns:
      The names of the files in the zip.

    Raises:
      UserError: if a model is none or of no GLUE task, two are of one task, or a test set is missing or is not GLUE's.
    """
    if output.suffix != ".zip":
        raise UserError(f"--output {output}: expected a name that ends in .zip")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    experiment.use_compilation_cache()
    found = _by_task(models, console)
    texts = {}
    for file in FILES:  # all are read before any is answered, which takes longer
        if file.trained in found:
            texts[file] = _texts(file, data or _data_of(found[file.trained]), console)
    loaded = {task: modules.load(folder) for task, folder in found.items()}
    for task, saved in loaded.items():
        _check(task, saved)
    pages = {}
    for file, rows in texts.items():
        if rows is not None:
            saved = loaded[file.trained]
            logits = _logits(saved, rows, file, console)
            pages[f"{file.name}.tsv"] = _page(file, saved, logits)
    _write(output, pages)
    console.say(f"{output}: {', '.join(pages)}")
    absent = [file.name for file in FILES if f"{file.name}.tsv" not in pages]
    if absent:
        console.warn(f"no answers for {', '.join(absent)}: the server expects a file for every task")
    return tuple(pages)


def _by_task(models: Sequence[Path], console: Console) -> dict[str, Path]:
    found: dict[str, Path] = {}
    answered = {file.trained for file in FILES}
    for model in models:
        folder = find_modules(model, console)
        task = model_folder.verify(folder)["task"]
        if task not in answered:
            raise UserError(f"--model {model} was trained on {task!r}: expected one of {', '.join(sorted(answered))}")
        if task in found:
            raise UserError(f"--model {found[task]} and {folder} are both of {task!r}: expected one of each task")
        found[task] = folder
    return found


def _data_of(folder: Path) -> str | None:
    try:
        return workdir.read_config(folder.parents[1]).data.path
    except UserError:  # modules that were copied out of their workdir
        return None


def _texts(file: File, data: str | None, console: Console) -> list[tuple[str, ...]] | None:
    """The rows of a test set in GLUE's order; None where AX is missing, which few have."""
    try:
        split = tasks.load(file.task, data).splits.get(file.split)
    except UserError as error:
        if file.task == file.trained:
            raise
        console.warn(f"{file.name} is left out: {error}")
        return None
    if split is None:
        raise UserError(f"{file.task} has no {file.split} split: it is needed for {file.name}.tsv")
    if len(split["label"]) != file.rows:
        raise UserError(
            f"the {file.split} split of {file.task} has {len(split['label']):,} rows, GLUE's has {file.rows:,}"
        )
    numbers = list(split["idx"]) if "idx" in (split.column_names if hasattr(split, "column_names") else split) else []
    if numbers and sorted(numbers) != list(range(file.rows)):
        raise UserError(f"the {file.split} split of {file.task}: idx must number the rows from 0 to {file.rows - 1:,}")
    rows = list(zip(*(split[name] for name in tasks.task(file.task).text), strict=True))
    return [rows[i] for i in np.argsort(numbers)] if numbers else rows


def _logits(saved: Saved, rows: Sequence[tuple[str, ...]], file: File, console: Console) -> np.ndarray:
    answer, found = answering(saved), []
    with console.counting(file.name, len(rows)) as show:
        for start in range(0, len(rows), CHUNK):
            found += answer(rows[start : start + CHUNK])
            show(min(start + CHUNK, len(rows)))
    return np.stack(found)


def _check(task: str, saved: Saved) -> None:
    """Raises a UserError if a model answers otherwise than GLUE's task of its name."""
    labels = tasks.task(task).labels
    if tuple(saved.labels) != tuple(labels):
        ours, theirs = (", ".join(names) or "numbers" for names in (saved.labels, labels))
        raise UserError(f"the model of {task} answers with {ours}, GLUE's {task} has {theirs}: it is of another task")


def _page(file: File, saved: Saved, logits: np.ndarray) -> str:
    if saved.labels:
        chosen = logits.argmax(1)
        answers: list[Any] = [saved.labels[i] for i in chosen] if file.named else chosen.tolist()
    else:
        least, greatest = tasks.task(file.task).label_range
        answers = [f"{x:.4f}" for x in np.clip(logits[:, 0], least, greatest)]
    return "index\tprediction\n" + "".join(f"{i}\t{answer}\n" for i, answer in enumerate(answers))


def _write(output: Path, pages: Mapping[str, str]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, page in pages.items():
            archive.writestr(name, page)
    beside = output.with_name(f".{output.name}.part")
    beside.write_bytes(packed.getvalue())
    os.replace(beside, output)
