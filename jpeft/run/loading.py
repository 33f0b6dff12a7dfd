"""The base model and the data of a run: loaded, tokenised, looked over, and padded to few lengths."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data import batching, checking, kinds, padding
from jpeft.data import tokenizer as tokenizers
from jpeft.data.batching import Examples
from jpeft.data.padding import Layout, Part
from jpeft.data.task import Data, Task, further, hidden
from jpeft.models import BertConfig
from jpeft.models.pretrained import Pretrained
from jpeft.run import config as configs
from jpeft.run import workdir as workdirs
from jpeft.run.config import Config
from jpeft.run.console import Console
from jpeft.run.seed import load_model
from jpeft.run.workdir import Inputs

__all__ = ["load"]

MOST_UNKNOWN = 0.5  # share of the words
MOST_CUT = 0.05  # share of the rows
MOST_SHARED = 0.05
SHOWN = 20  # names of classes
RARE = 20  # times as rare as a class of nearly the same name
COMPILE_TOKENS = 8000  # of MiniLM, 384 wide, that two cores train on in the time of one compilation


def load(config: Config, console: Console) -> tuple[Data, Pretrained, Inputs]:
    """Loads the base model, loads and tokenises the data of a run, and says what they are; the inputs identify both.

    Raises:
      UserError: if the data or the model cannot be loaded.
    """
    task = configs.task_of(config)
    base = load_model(config, task, config.seeds[0])  # each seed draws its own head
    data, source = _load_data(config, task, base, console)
    lengths = ", ".join(map(str, padding.padded_lengths(data.layouts)))
    console.say(
        f"  {data.train.size:,} examples to train on, padded to {lengths} tokens, "
        f"{data.dev.size:,} of {task.eval_split} to evaluate on"
        + "".join(f", {examples.size:,} of {name} at the end" for name, examples in data.others.items())
    )
    if config.task == configs.CUSTOM and task.labels:
        counts = task.answers.counts(data.train.labels, len(task.labels))
        shown = [f"{name!r} {n:,}" for name, n in zip(task.labels, counts, strict=True)][:SHOWN]
        more = ", ..." if len(task.labels) > SHOWN else ""
        console.say(f"  {len(task.labels)} classes, with so many training rows: {', '.join(shown)}{more}")
        _check_names(task.labels, counts, console)
    if "classifier" not in base.fresh:
        _check_head(base, task.labels, console)
    if base.fresh:
        console.say(f"  not trained in the checkpoint, so initialised and trained: {', '.join(base.fresh)}")
    results = configs.results(config, base.config, data.train.size)
    return data, base, workdirs.inputs(data, base, source, config.task, config.init_from, results)


def _load_data(config: Config, task: Task, base: Pretrained, console: Console) -> tuple[Data, str]:
    if not task.trainable:
        raise UserError(f"config.task {task.name!r} is a test set without training data: train config.task 'mnli'")
    if task.kind == "multilabel" and "adamix" in configs.named(config):
        raise UserError("adamix's penalty needs one class a row, and here are sets of them: take pfeiffer, for example")
    own = config.task.endswith(".py")  # all others check their own
    splits = checking.splits(task, config.data.path) if own else task.splits(config.data.path)
    for name, count in splits.empty_texts.items():
        console.warn(f"{task.name} {name}: {count} rows have an empty text")
    if splits.absent:
        console.say(f"  {splits.source} has no {', '.join(splits.absent)} split; none is needed")
    tokenizer = tokenizers.load(base.folder, base.config.vocab_size, words=task.answers.by_token)
    given = splits.splits | {"train": _few(splits.splits["train"], config.train.max_train_examples)}
    train, dev = (task.encode(given[name], tokenizer, config.train.max_length) for name in ("train", task.eval_split))
    _check_known(train, tokenizer, base.folder, console)
    others = {
        name: task.encode(splits.splits[name], tokenizer, config.train.max_length)
        for name in further(task, splits)
        if _labelled(task, name, splits.splits[name]["label"], console)
    }
    for name, examples in (("train", train), (task.eval_split, dev), *others.items()):
        _check_cut(examples, config.train.max_length, name, console)
        if name != "train" and (own or config.task == configs.CUSTOM):
            _check_apart(train, examples, name, console)
    if task.answers.by_token:
        for name, examples in (("train", train), (task.eval_split, dev), *others.items()):
            _check_words(splits.splits[name]["label"], examples, name, console)
    if task.labels:
        counts = task.answers.counts(train.labels, len(task.labels))
        for name in (name for name, n in zip(task.labels, counts, strict=True) if n == 0):
            console.warn(f"no training row has the label {name!r}")
    if task.kind == "multilabel" and train.labels.sum(1).max() <= 1:
        console.warn("no training row has more than one label; in text, names stand between ';'")
    # Not by the number of seeds: what a seed ends in must not depend on which others are beside it.
    layouts, buckets = _padded(config, base.config, train.lengths, dev.lengths)
    return Data(task, train, dev, layouts, buckets, others, config.train.group_by_length), splits.source


def _check_head(base: Pretrained, labels: Sequence[str], console: Console) -> None:
    """A checkpoint's head is kept, so its classes have to be in the task's order."""
    named = files.read_json(base.folder / "config.json").get("id2label")
    named = {int(key): str(x) for key, x in named.items() if key.isdigit()} if isinstance(named, dict) else {}
    theirs = [named[key] for key in sorted(named)]
    first, second = ([name.casefold() for name in names] for names in (theirs, labels))
    if sorted(first) == sorted(second) and first != second:
        raise UserError(
            f"the head in {base.folder} answers with {', '.join(theirs)}, and this task with {', '.join(labels)}: "
            "expected the same order, or a checkpoint without a head"
        )
    console.say(f"  the head is the checkpoint's own, of {', '.join(map(str, theirs[:SHOWN])) or 'a value'}")


def _check_names(names: Sequence[str], counts: np.ndarray, console: Console) -> None:
    """Warns of classes that are rare, and called nearly as a frequent one is."""
    for name, n in zip(names, counts, strict=True):
        often = [x for x, m in zip(names, counts, strict=True) if m > RARE * n]
        near = difflib.get_close_matches(name, often, 1, 0.9) if n else []
        # Numbered names are alike, and mean it.
        if near and re.sub(r"\d", "", name) != re.sub(r"\d", "", near[0]):
            console.warn(f"the label {name!r} has {n:,} rows, and {near[0]!r} many more: is it the same, misspelt?")


def _check_words(tags: Sequence[Sequence[int]], examples: Examples, split: str, console: Console) -> None:
    """Words beyond the greatest length have no token, nor have those that the tokenizer drops."""
    words, found = sum(map(len, tags)), len(kinds.flat(examples.labels))
    if not found:
        raise UserError(f"no word of {split} has a token: expected a tokenizer for the language of the texts")
    if found < words:
        console.warn(
            f"{words - found:,} of {words:,} words of {split} are beyond config.train.max_length, or no token to the "
            "tokenizer: they are left out"
        )


def _check_cut(examples: Examples, most: int, split: str, console: Console) -> None:
    """A row as long as the limit was cut there, or just fits."""
    full = float(np.mean(examples.lengths >= most)) if examples.size else 0.0
    if full > MOST_CUT:
        console.warn(
            f"{100 * full:.0f} % of the rows of {split} fill config.train.max_length, {most} tokens, and are cut there"
        )


def _check_apart(train: Examples, examples: Examples, split: str, console: Console) -> None:
    """Scores on training rows say nothing."""
    pairs = zip(train.input_ids, train.token_type_ids, strict=True)
    seen = {(ids.tobytes(), types.tobytes()) for ids, types in pairs}
    pairs = zip(examples.input_ids, examples.token_type_ids, strict=True)
    both = sum((ids.tobytes(), types.tobytes()) in seen for ids, types in pairs)
    if both > MOST_SHARED * examples.size:
        console.warn(f"{both:,} of {examples.size:,} rows of {split} have the text of training rows")


def _labelled(task: Task, split: str, labels: Sequence[float], console: Console) -> bool:
    without = hidden(task, labels)
    if 0 < without < len(labels):
        console.warn(f"{without:,} of {len(labels):,} rows of {split} have no label: it is not scored")
    return not without


def _check_known(examples: Examples, tokenizer: Any, folder: Path, console: Console) -> None:
    """Checks that the tokenizer knows the words of the texts: on unknown ones, nothing can be learned."""
    ids = np.concatenate(examples.input_ids)
    words = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])]
    unknown = float(np.mean(words == tokenizer.unk_token_id)) if len(words) else 0.0
    told = f"{100 * unknown:.0f} % of the words are unknown to the tokenizer in {folder}"
    if unknown > MOST_UNKNOWN:
        raise UserError(f"{told}: expected one for the language of the texts")
    if unknown > 0.1:
        console.warn(told)


def _padded(
    config: Config, model: BertConfig, train: np.ndarray, dev: np.ndarray
) -> tuple[tuple[Layout, ...], tuple[int, ...]]:
    """The layouts of training batches, and the padded lengths of evaluation.

    An accelerator compiles long and computes fast: there are few programs, of whole batches. On CPU as many as pay.
    """
    parts, most, multiple, worth, evaluated = 1, 4, 8, 0.0, 4
    if jax.default_backend() == "cpu":
        # Time to compile grows with the layers, and that of a token with layers and the square of the width.
        worth = COMPILE_TOKENS * (384 / model.hidden_size) ** 2 / config.train.num_epochs
        parts, most, multiple, evaluated = 4, 8, 2, 32
    rows = config.train.batch_size
    if config.train.group_by_length:  # whole batches, at as many lengths as evaluation has
        lengths = padding.length_buckets(train, evaluated, multiple, worth)
        layouts = tuple((Part(rows, min(length, model.max_length)),) for length in lengths)
    else:
        parts = config.train.padded_lengths or parts
        layouts = padding.layouts(train, rows, parts, most, multiple, worth, model.max_length)
    buckets = padding.length_buckets(dev, evaluated, multiple, worth)
    return layouts, tuple(min(length, model.max_length) for length in buckets)


def _few(split: Any, most: int | None) -> Any:
    """At most so many rows of a split, the same for every seed; drawn before they are tokenised, which takes longer."""
    if most is None or most >= len(split["label"]):
        return split
    rows = batching.drawn(len(split["label"]), most, seed=0)
    return split.select(rows) if hasattr(split, "select") else {k: [v[i] for i in rows] for k, v in split.items()}
