"""Predictions for the rows of a file: streamed, in the order of the input, and resumed where they stopped."""

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.data.batching import tokenize
from jpeft.data.rows import ENDINGS, attempts, text_of
from jpeft.data.tasks import TASKS
from jpeft.run import experiment, workdir
from jpeft.run.config import CUSTOM, listed
from jpeft.run.console import Console
from jpeft.serving.answers import Answers, held
from jpeft.serving.export import find_modules
from jpeft.store import modules
from jpeft.store.modules import Saved
from jpeft.training import step
from jpeft.training.compiled import Compiled
from jpeft.training.loop import evaluate

__all__ = ["Counts", "answering", "predict"]

CHUNK = 2048  # rows that are answered, written and noted together
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)  # that rows are padded to, up to the longest
STDIN = "-"
WRITES = (".jsonl", ".csv", ".tsv")

Row = tuple[int, tuple[str, ...] | UserError]


class Counts(NamedTuple):
    """How many rows got an answer, and how many could not be read."""

    answered: int
    unread: int


def predict(model: Path, source: str, output: Path, console: Console, text: Sequence[str] | None = None) -> Counts:
    """Writes a label with its probabilities, or of a regression a value, for every row of a file.

    Args:
      model: a `seed_<n>/model` folder, or a workdir, whose best seed is taken.
      source: a JSON lines, CSV, TSV or parquet file; "-" reads JSON lines from the standard input.
      output: a JSON lines, CSV or TSV file that is not there yet, or that an earlier call began. It names rows by their
        number, from 1. Beside it, `<output>.errors.jsonl` lists the rows that could not be read, if there are any.
      console: shows what is going on.
      text: the columns with text, one or two as in training; None takes those of the task.

    Returns:
      What was counted, over all calls that it took.

    Raises:
      UserError: if the model, the input or the output is none of these, or the output is of another model or input.
    """
    experiment.use_compilation_cache()
    folder = find_modules(model, console)
    saved = modules.load(folder)
    columns = _columns(folder, saved, text)
    ending = output.suffix
    if ending not in WRITES:
        raise UserError(f"--output {output}: {nearest(ending, WRITES)}")
    given = sys.stdin.buffer if source == STDIN else None
    file = Path("standard input" if source == STDIN else source)
    if given is None and not file.is_file():
        raise UserError(f"--input: there is no file {file}")
    if given is None and not source.endswith(ENDINGS):
        raise UserError(f"--input {file} is of an unknown kind: expected {', '.join(ENDINGS)}")
    identity = {
        "model": files.file_hash(folder / modules.WEIGHTS),
        "input": "" if given else files.file_hash(file),
        "text": list(columns),
        "backend": jax.default_backend(),
    }
    total = None if given else sum(1 for _ in _rows(file, None, columns))
    if total == 0:
        raise UserError(f"{file} has no rows")
    with held(output):
        return _predict(saved, file, given, columns, Answers(output, identity), total, console)


def _predict(
    saved: Saved,
    file: Path,
    given: BinaryIO | None,
    columns: Sequence[str],
    answers: Answers,
    total: int | None,
    console: Console,
) -> Counts:
    done = answers.begin()
    if done:
        console.say(f"  resuming at row {done + 1:,}")
    answer = answering(saved, columns)
    rows = itertools.islice(_rows(file, given, columns), done, None)
    with console.counting("predicting", total, done) as show:
        while chunk := list(itertools.islice(rows, CHUNK)):
            good = [(number, texts) for number, texts in chunk if not isinstance(texts, UserError)]
            bad = [(number, str(error)) for number, error in chunk if isinstance(error, UserError)]
            logits = answer([texts for _, texts in good])
            written = _lines([number for number, _ in good], logits, saved.labels, answers.output.suffix, head=not done)
            done += len(chunk)
            answers.add(written, "".join(json.dumps({"row": n, "error": e}) + "\n" for n, e in bad), done, len(bad))
            show(done)
    answers.end()
    if not done:
        raise UserError(f"{file} has no rows")
    counts = Counts(done - answers.unread, answers.unread)
    if not counts.answered:
        raise UserError(f"none of the {done:,} rows could be read: {answers.errors} says why")
    console.say(f"{counts.answered:,} rows answered: {answers.output}")
    if counts.unread:
        console.warn(f"{counts.unread:,} row{'s' * (counts.unread > 1)} could not be read: {answers.errors}")
    return counts


def _columns(folder: Path, saved: Saved, text: Sequence[str] | None) -> tuple[str, ...]:
    found = tuple(text or ())
    if not found and saved.task in TASKS:
        found = TASKS[saved.task].text
    elif not found and saved.task == CUSTOM:
        try:
            found = listed(workdir.read_config(folder.parents[1]).data.text)
        except UserError:
            found = ()
    if not found:
        raise UserError(f"name the columns with text, as in --text sentence1{',sentence2' * (saved.num_texts == 2)}")
    if len(found) != saved.num_texts or len(set(found)) < len(found):
        raise UserError(
            f"--text must name {saved.num_texts} column{'s' * (saved.num_texts > 1)}, as in training, got {found}"
        )
    return found


def _rows(file: Path, given: BinaryIO | None, columns: Sequence[str]) -> Iterator[Row]:
    """The numbers of the rows, with their texts or why they have none.

    Raises:
      UserError: if the first row that can be read lacks a column: that is not a matter of this row.
    """
    checked = False
    for number, row in enumerate(attempts(file, given), start=1):
        where = f"{file}, row {number}"
        if not isinstance(row, UserError):
            missing = None if checked else next((name for name in columns if name not in row), None)
            if missing is not None:
                raise UserError(f"{where}: no column {missing!r}; {nearest(missing, row)}")
            checked = True
        yield number, _texts(row, columns, where)


def _texts(row: Any, columns: Sequence[str], where: str) -> tuple[str, ...] | UserError:
    if isinstance(row, UserError):
        return row
    try:
        return tuple(text_of(row, name, where) for name in columns)
    except UserError as error:
        return error


def answering(saved: Saved, columns: Sequence[str]) -> Any:
    """The function from texts to logits.

    Its padded lengths do not depend on the texts, or a run that resumes would answer in other digits.
    """
    config = saved.model.config
    run = Compiled(step.eval_step(saved.model, saved.transform), 2)
    longest = min(saved.max_length, config.max_length)
    buckets = [length for length in LENGTHS if length < longest] + [longest]

    def answer(texts: Sequence[tuple[str, ...]]) -> np.ndarray:
        if not texts:
            return np.zeros((0, len(saved.labels) or 1), np.float32)
        split: dict[str, Any] = {name: [row[i] for row in texts] for i, name in enumerate(columns)}
        split |= {"label": [0] * len(texts)}
        examples = tokenize(split, columns, saved.tokenizer, longest, np.int32)
        logits = evaluate(run, saved.variables, {"params": {}, "peft": {}}, examples, buckets)
        if not np.isfinite(logits).all():
            raise UserError("the model's answers are not finite")
        return logits

    return answer


def _lines(rows: Sequence[int], logits: np.ndarray, labels: Sequence[str], ending: str, head: bool) -> str:
    """The answers as text, in numbers of seven digits."""
    shares = logits.astype(np.float64)
    if labels:
        shares = np.exp(shares - shares.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
    names = [*labels] if labels else ["value"]
    digits = [[float(f"{x:.7g}") for x in row] for row in shares.tolist()]
    best = logits.argmax(1).tolist() if labels else []
    if ending == ".jsonl":
        if labels:
            found: Iterator[Any] = (
                {"row": n, "label": labels[i], "probabilities": dict(zip(names, own, strict=True))}
                for n, i, own in zip(rows, best, digits, strict=True)
            )
        else:
            found = ({"row": n, "value": own[0]} for n, own in zip(rows, digits, strict=True))
        return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
    text = io.StringIO()
    write = csv.writer(text, delimiter="," if ending == ".csv" else "\t", lineterminator="\n").writerow
    if head:
        write(["row", *(["label"] if labels else []), *names])
    for i, (n, own) in enumerate(zip(rows, digits, strict=True)):
        write([n, *([labels[best[i]]] if labels else []), *own])
    return text.getvalue()
