"""Predictions for the rows of a file: streamed, in the order of the input, and resumed where they stopped."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError, nearest
from jpeft.data.kinds import KINDS
from jpeft.data.rows import ENDINGS, attempts, text_of, words_of
from jpeft.data.tasks import TASKS
from jpeft.run import experiment, workdir
from jpeft.run.config import CUSTOM, split_names
from jpeft.run.console import Console
from jpeft.serving.answers import Answers, held
from jpeft.serving.export import find_modules
from jpeft.serving.lines import WRITES, lines
from jpeft.serving.prediction import BATCH_SIZE, by_sentence, encode, longest, shapes
from jpeft.store import model_folder, modules
from jpeft.store.modules import Saved
from jpeft.training import step
from jpeft.training.compiled import Compiled
from jpeft.training.loop import evaluate

__all__ = ["Counts", "answering", "predict"]

CHUNK = 2048  # rows that are answered, written and noted together
STDIN = "-"

Row = tuple[int, tuple[Any, ...] | UserError]
Read = Callable[[Mapping[str, Any], str, str], Any]


class Counts(NamedTuple):
    """How many rows got an answer, and how many could not be read."""

    answered: int
    unread: int


def predict(model: Path, source: str, output: Path, console: Console, text: Sequence[str] | None = None) -> Counts:
    """Writes an answer for every row of a file: a label with its probabilities, a value, several labels, or tags.

    Args:
      model: a `seed_<n>/model` folder, or a workdir, whose best seed is taken.
      source: a JSON lines, CSV, TSV, parquet or CoNLL file; "-" reads JSON lines from the standard input.
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
        # It has the hash of the weights, and the names of the classes.
        "model": files.file_hash(folder / model_folder.DESCRIPTION),
        "input": "" if given else files.file_hash(file),
        "text": list(columns),
        "backend": jax.default_backend(),
    }
    total = None if given else sum(1 for _ in _rows(file, None, columns, reader(saved)))
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
    answer, empty = answering(saved), 0
    rows = itertools.islice(_rows(file, given, columns, reader(saved)), done, None)
    with console.counting("predicting", total, done) as show:
        while chunk := list(itertools.islice(rows, CHUNK)):
            texts = {number: row for number, row in chunk if not isinstance(row, UserError)}
            empty += sum(not all(isinstance(text, list) or text.strip() for text in row) for row in texts.values())
            # In the order of the rows: logits, or why there are none.
            found = dict(chunk) | dict(zip(texts, answer(list(texts.values())), strict=True))
            bad = {number: str(own) for number, own in found.items() if isinstance(own, UserError)}
            logits: dict[int, Any] = {number: own for number, own in found.items() if number not in bad}
            numbers, own = list(logits), list(logits.values())
            written = lines(saved.kind, numbers, own, saved.labels, answers.output.suffix, head=not done)
            done += len(chunk)
            told = "".join(json.dumps({"row": number, "error": error}) + "\n" for number, error in bad.items())
            answers.add(written, told, done, len(bad))
            show(done)
    answers.end()
    if not done:
        raise UserError(f"{file} has no rows")
    counts = Counts(done - answers.unread, answers.unread)
    if not counts.answered:
        raise UserError(f"none of the {done:,} rows could be read: {answers.errors} says why")
    console.say(f"{counts.answered:,} rows answered: {answers.output}")
    if empty:
        console.warn(f"{empty:,} row{'s' * (empty > 1)} with an empty text got an answer like any other")
    if counts.unread:
        console.warn(f"{counts.unread:,} row{'s' * (counts.unread > 1)} could not be read: {answers.errors}")
    return counts


def _columns(folder: Path, saved: Saved, text: Sequence[str] | None) -> tuple[str, ...]:
    found = tuple(text or ())
    if not found and saved.task in TASKS:
        found = TASKS[saved.task].text
    elif not found and saved.task == CUSTOM:
        try:
            found = split_names(workdir.read_config(folder.parents[1]).data.text)
        except UserError:
            found = ()
    if not found:
        raise UserError(f"name the columns with text, as in --text sentence1{',sentence2' * (saved.num_texts == 2)}")
    if len(found) != saved.num_texts or len(set(found)) < len(found) or "" in found:
        raise UserError(
            f"--text must name {saved.num_texts} column{'s' * (saved.num_texts > 1)}, as in training, got {found}"
        )
    return found


def reader(saved: Saved) -> Read:
    """What reads a column of a row: a text, or words."""
    return words_of if KINDS[saved.kind].by_token else text_of


def _rows(file: Path, given: BinaryIO | None, columns: Sequence[str], read: Read) -> Iterator[Row]:
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
        yield number, _texts(row, columns, where, read)


def _texts(row: Any, columns: Sequence[str], where: str, read: Read) -> tuple[Any, ...] | UserError:
    if isinstance(row, UserError):
        return row
    try:
        return tuple(read(row, name, where) for name in columns)
    except UserError as error:
        return error


def answering(saved: Saved) -> Any:
    """The function from texts to the logits of each; of tagging, of its words, or a UserError for a sentence too long.

    Its padded lengths do not depend on the texts, or a run that resumes would answer in other digits.
    """
    run = Compiled(step.eval_step(saved.model, saved.transform), 2)
    _, buckets = shapes(BATCH_SIZE, longest(saved))

    def answer(texts: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        if not texts:
            return []
        examples = encode(saved, texts)
        logits = evaluate(run, saved.variables, {"params": {}, "peft": {}}, examples, buckets)
        if not np.isfinite(logits).all():
            raise UserError("the model's answers are not finite")
        return by_sentence(saved, texts, examples, logits) if KINDS[saved.kind].by_token else list(logits)

    return answer
