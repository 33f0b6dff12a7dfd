"""Feeds broken and foreign data, models, plans, configs and workdirs to every program, from the outside.

    python third_party/benchmarks/fuzz.py --folder /tmp/fuzz                      # all, one to two hours of one core
    python third_party/benchmarks/fuzz.py --folder /tmp/fuzz --cases 20 --seed 7  # 20 of each class, drawn at random
    python third_party/benchmarks/fuzz.py --folder /tmp/fuzz --only damage,plan

Every case is a fresh folder with a random BERT of two layers, two small tables and the workdirs that it asks for:
finished runs, runs that were cut off, a foreign one. It does some damage and runs one program in a fork. Acceptable is
exit code 2 with one line on stderr and no file touched, or exit code 0 with what the case can check: the numbers of
the undamaged run, bit for bit, or finite scores. Anything else is printed as a finding, with its folder, which is kept,
and the exit code is 1. `cases.txt` in the folder says how every case ended. Written from the description of what jpeft
promises, without a look at its code. It needs no network.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

PROGRAMS = ("main", "compare", "report", "export", "predict", "submit")
COMMON = (
    "--config.model=tiny",
    "--config.data.text=text",
    "--config.data.label=label",
    "--config.data.train=train.csv",
    "--config.data.validation=dev.csv",
    "--config.train.num_epochs=2",
    "--config.train.batch_size=8",
    "--config.train.max_length=16",
    "--config.train.padded_lengths=1",
    "--config.peft.lora.rank=2",
    "--config.seeds=(1,)",
)
LORA = ("--config=lora,custom", *COMMON)
OTHERS = tuple(a for a in COMMON if "peft" not in a)
GRID = """from jpeft.workbench import compare
def get_config():
    c = compare.default(("lora", "head"), tasks=("custom",), seeds=(1,))
    c.run.model = "tiny"
    c.run.data.update(train="train.csv", validation="dev.csv", text=("text",), label="label")
    c.run.train.update(num_epochs=1, batch_size=8, max_length=16, padded_lengths=1)
    return c
"""
RUNS = {  # workdirs that cases start from
    "run": LORA,
    "mask": ("--config=fish,custom", *OTHERS, "--config.peft.fish.num_examples=16"),
    "pal": ("--config=fishpal,custom", *OTHERS, "--config.fishpal.criterion=trace", "--config.fishpal.num_examples=16"),
}
Damage = Callable[[], Any]  # is done in the folder of the case


class Case(NamedTuple):
    """One program on one folder, and what may come of it.

    `want` is refused; sane: refused, or a finite result; fine: a result; same: refused, or the numbers of the undamaged
    run; again: these numbers.
    """

    kind: str
    name: str
    call: tuple[str, ...] | Callable[[], Any]  # a program with its arguments, or Python
    want: str = "sane"
    damage: Damage | None = None
    needs: str = ""  # of run, half, other
    check: Callable[[str], str | None] | None = None  # of stdout, after exit code 0


# What cases are made of.


def tiny(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random BERT, 16 wide, whose tokenizer spells words by letters."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = ["good", "bad", "fine", "film", "meal", "book", "the", "was", "not"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "vocab_size": len(vocabulary),
        "initializer_range": 0.02,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors: dict[str, np.ndarray] = {}

    def dense(name: str, out: int, into: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, 0.3, (out, into)).astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(out, np.float32)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = np.ones(16, np.float32), np.zeros(16, np.float32)

    for name, rows in (("word", len(vocabulary)), ("position", 64), ("token_type", 2)):
        tensors[f"embeddings.{name}_embeddings.weight"] = rng.normal(0, 0.3, (rows, 16)).astype(np.float32)
    norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}" for i in range(2)):
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", 16, 16)
        dense(f"{layer}.attention.output.dense", 16, 16)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", 32, 16)
        dense(f"{layer}.output.dense", 16, 32)
        norm(f"{layer}.output.LayerNorm")
    dense("pooler.dense", 16, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def table(rows: int, seed: int, first: str = "") -> str:
    rng, lines = random.Random(seed), ["text,label"]
    for i in range(rows):
        label = i % 2
        lines += [f"the {rng.choice(('film', 'book', 'meal'))} was {('bad', 'good')[label]}{first} {i},{'np'[label]}"]
    return "\n".join(lines) + "\n"


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def records(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def put(path: str, content: str | bytes) -> Damage:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return write


def edit(path: str, change: Callable[[Any], Any]) -> Damage:
    """Changes the tensors or the JSON of a file."""

    def write() -> None:
        if path.endswith(".safetensors"):
            tensors = load_file(path)
            save_file(change(tensors) or tensors, path, {"format": "pt"})
        else:
            content = json.loads(Path(path).read_text())
            changed = change(content)
            Path(path).write_text(json.dumps(content if changed is None else changed))

    return write


def replace(path: str, old: str, new: str) -> Damage:
    def write() -> None:
        text = Path(path).read_text()
        assert old in text, f"{old!r} is not in {path}"
        Path(path).write_text(text.replace(old, new, 1))

    return write


def spoil(path: str, how: str, seed: int) -> None:
    """What can happen to one file or folder."""
    file, rng = Path(path), random.Random(seed)
    content = file.read_bytes() if file.is_file() else b""
    if how in ("flip", "flip two") and content:
        spoiled = bytearray(content)
        for _ in range(1 if how == "flip" else 2):
            spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        file.write_bytes(spoiled)
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == "tail":
        file.write_bytes(content + b"\0{}\n")
    elif how == "noise":
        file.write_bytes(rng.randbytes(300))
    elif how == "json":
        file.write_text(rng.choice(("[]", "{}", "null", '"a"', "1" * 5000, "[" * 100_000, '{"sha256": "\\ud800"}')))
    elif how == "foreign":  # the same file of another run
        source = Path("other", *file.parts[1:])
        if source.is_file():
            shutil.copy(source, file)
        else:
            how = "gone"
    if how in ("gone", "folder", "loop", "fifo", "empty"):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        if how == "folder":
            (file / "inside").mkdir(parents=True)
        elif how == "loop":
            file.symlink_to(file.name)
        elif how == "fifo":
            os.mkfifo(file)
        elif how == "empty":
            file.write_bytes(b"")


DAMAGES = ("flip", "flip two", "cut", "tail", "noise", "json", "foreign", "gone", "folder", "loop", "fifo", "empty")


def numbers(workdir: str) -> dict[str, Any]:
    """What a run is about: its scores, its predictions and its modules, with the bytes of the last two."""
    found: dict[str, Any] = {}
    for seed in sorted(Path(workdir).glob("seed_*")):
        for file in (seed / "predictions.safetensors", seed / "model" / "modules.safetensors"):
            found[f"{seed.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    report = json.loads((Path(workdir) / "report.json").read_text())
    return found | {"metrics": report["metrics"], "seeds": report.get("seeds")}


def finite(workdir: str) -> str | None:
    """Why a report holds no sane scores."""
    text = (Path(workdir) / "report.json").read_text()
    bad = re.findall(r"\bNaN\b|\bInfinity\b", text)
    lost = [str(f) for f in Path(workdir).glob("seed_*/model/modules.safetensors")]
    for file in lost:
        if not all(np.isfinite(x).all() for x in load_file(file).values() if x.dtype.kind == "f"):
            return f"{file} is not finite"
    return f"{bad[0]} in report.json" if bad else None if lost else "no modules"


# The cases. Tables, so no formatter.

# fmt: off


def model_cases() -> Iterator[Case]:
    def case(name: str, damage: Damage, want: str = "refused") -> Case:
        return Case("model", name, ("main", *LORA, "--workdir=new"), want, damage)

    weights, config = "tiny/model.safetensors", "tiny/config.json"
    for name in ("vocab.txt", "config.json", "model.safetensors"):
        for how in ("gone", "folder", "loop", "fifo", "empty", "noise", "cut"):
            want = "sane" if how == "cut" and name == "vocab.txt" else "refused"
            yield case(f"{name} {how}", lambda name=name, how=how: spoil(f"tiny/{name}", how, 1), want)
    for how in ("json", "loop", "folder", "fifo", "noise"):
        yield case(f"tokenizer_config {how}", lambda how=how: spoil("tiny/tokenizer_config.json", how, 1), "sane")
    for text in ("[]", "{}", "null", "3", '"bert"', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"a": "\\ud800"}'):
        yield case(f"config.json {text[:12]}", put(config, text))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
                "max_position_embeddings", "type_vocab_size"):
        for value in (0, -1, "16", 1.5, True, None, [], 10**12, 10**400, float("nan"), 3):
            want = "sane" if value is None else "refused"
            yield case(f"config.json {key}={str(value)[:9]}", edit(config, lambda c, k=key, v=value: c | {k: v}), want)
    for key, values in {"hidden_act": ([], {}, "gelu_typo", 3, True, None, ""),
        "layer_norm_eps": (0, -1, "x", [], float("nan"), float("inf"), 1e300, True),
        "hidden_dropout_prob": (2, -0.1, "x", float("nan"), [], True),
        "attention_probs_dropout_prob": (2, 1.0, -0.1, "x", float("inf")), "pad_token_id": (-1, 10**9, "x", [], 1.5),
        "model_type": ("gpt2", [], 3, "", "roberta"), "position_embedding_type": ("relative_key", [], 3),
        "is_decoder": (True, "x"), }.items():
        for value in values:
            want = "sane" if key in ("pad_token_id", "is_decoder", "model_type") or value is None else "refused"
            yield case(f"config.json {key}={value}", edit(config, lambda c, k=key, v=value: c | {k: v}), want)
    query = "encoder.layer.1.attention.self.query.weight"
    for name, change, want in (("lacks query", lambda t: {k: v for k, v in t.items() if k != query}, "refused"),
        ("lacks pooler", lambda t: {k: v for k, v in t.items() if "pooler" not in k}, "sane"),
        ("shape", lambda t: t | {query: t[query][:8]}, "refused"),
        ("transposed", lambda t: t | {"encoder.layer.0.intermediate.dense.weight": np.zeros((16, 32), "f")}, "refused"),
        ("NaN", lambda t: t | {query: t[query] * np.nan}, "refused"),
        ("inf", lambda t: t | {query: np.full((16, 16), np.inf, "f")}, "refused"),
        ("int64", lambda t: t | {query: t[query].astype(np.int64)}, "refused"),
        ("bool", lambda t: t | {query: t[query] > 0}, "refused"),
        ("uint8", lambda t: {k: v.astype(np.uint8) for k, v in t.items()}, "refused"),
        ("float16", lambda t: {k: v.astype(np.float16) for k, v in t.items()}, "sane"),
        ("float64", lambda t: {k: v.astype(np.float64) for k, v in t.items()}, "sane"),
        ("huge", lambda t: t | {query: np.full((16, 16), 3e38, "f")}, "sane"),
        ("extra layer", lambda t: t | {query.replace("1", "2"): t[query]}, "refused"),
        ("extra", lambda t: t | {"something.else": t[query]}, "sane"),
        ("no row", lambda t: t | {"embeddings.word_embeddings.weight": np.zeros((0, 16), "f")}, "refused"),
        ("few rows", lambda t: t | {"embeddings.word_embeddings.weight": np.ones((9, 16), "f")}, "refused"),
        ("both prefixes", lambda t: t | {f"bert.{k}": v + 1 for k, v in t.items()}, "sane"),
        ("all zero", lambda t: {k: v * 0 for k, v in t.items()}, "sane"), ):
        yield case(f"weights {name}", edit(weights, change), want)
    words = "tiny/vocab.txt"
    yield case("tokenizer too large", lambda: put(words, Path(words).read_text() + "zzz\nyyy\n")())
    yield case("vocabulary twice the same", lambda: put(words, Path(words).read_text().replace("film", "good"))(),
        "sane")
    yield case("vocabulary without [CLS]", replace(words, "[CLS]", "cls"))
    yield case("vocabulary without [UNK]", replace(words, "[UNK]", "unk"))
    yield case("vocabulary of latin-1", lambda: put(words, Path(words).read_bytes() + b"\xff\xfe\n")())
    yield case("vocabulary of letters unknown", put(words, "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n\u4e00\n"), "sane")
    yield case("tokenizer.json broken", put("tiny/tokenizer.json", "{"))
    yield case("tokenizer.json list", put("tiny/tokenizer.json", "[]"))
    yield case("pickle only", lambda: Path("tiny/model.safetensors").rename("tiny/pytorch_model.bin"))
    for value in ("nowhere", "", "train.csv", "/", "/dev/null", "tiny/config.json", "a\nb", "x" * 5000, "../" * 400,
        "None"):
        yield Case("model", f"model={value[:20]!r}", ("main", *LORA, f"--config.model={value}")[0:1] + tuple(
            a for a in LORA if "model" not in a) + (f"--config.model={value}", "--workdir=new"), "refused")


NUMBERS = ("nan", "inf", "-inf", "abc", "", "[]", "1" * 5000, "-1", "1e400", "1e999999999")  # never right
ODD = ("0", "1", "2.5", "True", "None", "1e-320", "1e30", "9223372036854775808", "2147483648", "0x10", " 3 ", "1_0",
    "()")


def config_cases() -> Iterator[Case]:
    fields = {"train": ("batch_size", "max_length", "num_epochs", "learning_rate", "weight_decay", "warmup_ratio",
                  "max_train_examples", "padded_lengths", "together"),
        "peft.lora": ("rank", "alpha", "dropout", "learning_rate_ratio"), "data": ("split_seed", "validation_fraction"),
    }
    once = [f"{group}.{name}" for group, names in fields.items() for name in names]
    for field in once:
        for value in NUMBERS + ODD:
            want = "refused" if value in NUMBERS else "sane"
            if (field, value) in (("data.split_seed", "-1"), ("data.validation_fraction", "-1")):
                want = "sane"
            if value in ("9223372036854775808", "2147483648", "1e30") and field.split(".")[-1] == "num_epochs":
                want = "refused"  # nobody waits for that
            yield setting(field, value, want)
    for field in ("train.remat", "train.shard_base", "train.tensorboard", "peft.lora.gate"):
        for value in ("yes", "2", "nan", "None", "[]", ""):
            yield setting(field, value, "sane")
    texts = ("", "abc", "None", "[]", "3", "\ud800", "a" * 5000, "nan", "../..", "a\nb", "(", "True")
    for field in ("train.dtype", "train.export", "data.kind", "data.text", "data.label", "data.labels", "data.path",
                  "data.train", "data.validation", "data.test", "data.hub", "task", "method", "init_from",
                      "peft.lora.targets", "peft.lora.layers", "peft.lora.rank_pattern", "peft.lora.alpha_pattern"):
        for value in texts:
            yield setting(field, value, "sane")
    for value in ("()", "(1, 1)", "(-1,)", "(1.5,)", "('a',)", "(None,)", "(True,)", "1", "abc", "(10**30,)",
        "(2**32,)", "(nan,)", "((1,),)", "[1]", "{1}", "(1", "(1,)(2,)", "range(3)", "(1,)*10**9", "(" * 2000,
                  "(" + "9" * 5000 + ",)"):
        want = "sane" if value in ("1", "[1]", "(2**32,)", "(True,)") else "refused"
        yield setting("seeds", value, want)
    fishpal = {"candidates": ("()", "('lora', 'lora')", "('nothing',)", "('full',)", "(1,)", "lora", "(None,)",
            "('fishpal',)"),
        "sizes": ("()", "(0,)", "(-1,)", "(nan,)", "('a',)", "(1e400,)", "(1e9,)", "(1, 1)", "x", "(True,)"),
        "rates": ("()", "(0,)", "(-1,)", "('x',)", "(1e400,)", "(1, 1)", "(None,)"),
        "budget": ("0", "-1", "abc", "0%", "-1%", "nan", "inf", "101%", "1e400", "1%%", "%"),
        "criterion": ("", "abc", "None", "3", "Race"), "num_examples": ("0", "-1", "abc", "1.5", "nan", "True"),
        "budget_of": ("", "abc", "None"), "factors.lora": ("nan", "-1", "inf", "abc", "0"),
        "learning_rates.lora": ("nan", "-1", "inf", "abc", "0", "1e30"), }
    for field, values in fishpal.items():
        for value in values:
            own = tuple(a.replace("lora,custom", "fishpal,custom") for a in LORA if "peft" not in a)
            lax = value in ("1e9,", "(1e9,)", "101%", "(True,)", "True", "lora", "0", "1e30", "(1, 1)", "None")
            yield Case("config", f"fishpal.{field}={value}", ("main", *own, f"--config.fishpal.{field}={value}",
                       "--workdir=new"), "sane" if lax else "refused")
    for flag in ("--config.nothing=1", "--config.train.nothing=1", "--config.train=1", "--config.peft.lora=None",
        "--nothing", "--config.=1", "--config..a=1", "--config.train.__class__=1", "--config.peft.dora.rank=3", "stray",
                 "--config.seeds", "--workdir", "--distributed=nonsense", "--distributed=a:1,2,3",
                     "--config.data.label"):
        yield Case("config", flag, ("main", *LORA, "--workdir=new", flag), "refused")
    for value in ("", "lora", "lora,", ",custom", "lora,custom,demo,x", "nothing,custom", "lora,nothing",
        "lora,custom:demo",
                  "full+lora,custom", "fishpal+lora,custom", "lora+lora,custom", "head+lora,custom", "lora+,custom",
                      "+,custom",
                  "/dev/null", "nowhere.py", ".", "train.csv", "lora,train.csv", "configs/glue.py:a:b", "\udcff"):
        yield Case("config", f"--config={value!a}", ("main", f"--config={value}", *COMMON, "--workdir=new"), "refused")


def setting(field: str, value: str, want: str) -> Case:
    kept = tuple(a for a in LORA if not a.startswith(f"--config.{field}="))
    return Case("config", f"{field}={value[:24]!a}", ("main", *kept, f"--config.{field}={value}", "--workdir=new"),
        want)


def file_cases() -> Iterator[Case]:
    good = "from jpeft.run import config\ndef get_config():\n    c = config.default('custom', 'lora')\n"
    good += "    {}\n    return c\n"
    for name, text in {"returns None": "def get_config(): pass", "returns a dict": "def get_config(): return {}",
        "returns text": "def get_config(): return 'lora,custom'", "exits": "import sys\nsys.exit(0)",
        "exits inside": "def get_config(): raise SystemExit(7)", "exits with text": "raise SystemExit('over')",
        "raises": "def get_config(): raise ValueError('a\\nb')", "divides": "1/0", "syntax": "def get_config(:",
        "no function": "x = 1", "not a function": "get_config = 3", "takes two": "def get_config(a, b): return a",
        "recursion": "def get_config(): return get_config()", "empty": "", "zeros": "\0\0", "latin": "# \udce9\nx = 'a",
        "imports": "import nothing_of_this_name", "class": "class get_config: pass", "interrupt": "raise MemoryError",
        "lacks train": good.format("del c.train"), "lacks seeds": good.format("del c.seeds"),
        "train None": good.format("c.unlock() if hasattr(c, 'unlock') else 0; c.train = None"),
        "lacks model": good.format("del c.model"), "lacks peft": good.format("del c.peft.lora"),
        "extra": good.format("c.unlock(); c.nonsense = 3"), "function": good.format("c.unlock(); c.model = print"),
        "array": good.format("import numpy as np; c.seeds = (np.int64(1),)"),
            "method list": good.format("c.method = 'a'"),
        "nan": good.format("c.train.weight_decay = float('nan')"), "cycle": good.format("c.unlock(); c.data.path = c"),
        "big": good.format("c.train.batch_size = 10**5000"), "generator": "def get_config(): yield 3",
        "surrogate": good.format("c.init_from = chr(0xd800)"), "set": good.format("c.unlock(); c.data.labels = {1, 2}"),
    }.items():
        for program in ("main", "compare"):
            extra = () if program == "compare" or "good" in name else COMMON if text.startswith("from") else ()
            want = "refused" if program == "compare" or name not in ("array",) else "sane"
            yield Case("config file", f"{name} ({program})", (program, "--config=own.py", *extra, "--workdir=new"),
                want, put("own.py", text))
    grid = "from jpeft.workbench import compare\ndef get_config():\n"
    grid += "    c = compare.default({}, tasks={}, seeds={})\n    c.run.model = 'tiny'\n"
    grid += "    c.run.data.update(train='train.csv', validation='dev.csv', text=('text',), label='label')\n"
    grid += "    {}\n    return c\n"
    for name, parts in {"no variant": ("()", "('custom',)", "(1,)", ""), "no task": ("('lora',)", "()", "(1,)", ""),
        "no seed": ("('lora',)", "('custom',)", "()", ""), "unknown": ("('loro',)", "('custom',)", "(1,)", ""),
        "unknown task": ("('lora',)", "('nothing',)", "(1,)", ""), "seeds": ("('lora',)", "('custom',)", "(1, 1)", ""),
        "variant": ("{'a': {'peft': 3}}", "('custom',)", "(1,)", ""), "field": ("{'a': {'no': 3}}", "('custom',)",
            "(1,)", ""),
        "value": ("{'a': {'method': 'lora', 'train': {'weight_decay': float('nan')}}}", "('custom',)", "(1,)", ""),
        "name": ("{'a/../b': {'method': 'lora'}}", "('custom',)", "(1,)", ""),
            "empty": ("{'': {}}", "('custom',)", "(1,)", ""),
        "rates": ("('lora',)", "('custom',)", "(1,)", "c.learning_rates = (float('inf'),)"),
        "rate": ("('lora',)", "('custom',)", "(1,)", "c.learning_rates = ('a',)"),
        "by task": ("('lora',)", "('custom',)", "(1,)", "c.unlock(); c.by_task = {'custom': {'train': 3}}"),
        "run": ("('lora',)", "('custom',)", "(1,)", "del c.run"), "null": ("{'a': None}", "('custom',)", "(1,)", ""),
    }.items():
        yield Case("config file", f"grid: {name}", ("compare", "--config=own.py", "--workdir=new"), "refused",
                   put("own.py", grid.format(*parts)))


PLANS = ("{}", "[]", "null", "3", '"lora"', '{"0": []}', '{"0": [], "1": []}', '{"0": [{"method": "lora"}], "0": []}',
    '{"0": [{"method": "lora"}], "0": [{"method": "lora"}]}', '{"00": [{"method": "lora"}]}',
        '{"-1": [{"method": "lora"}]}',
    '{"9": [{"method": "lora"}]}', '{"a": [{"method": "lora"}]}', '{"1.0": [{"method": "lora"}]}',
        '{"0": {"method": "lora"}}',
    '{"0": [{"method": "lora", "options": {"rank": true}}]}', '{"0": [{"method": "lora", "options": {"gate": "yes"}}]}',
    '{"0": [{"method": "lora", "options": {"gate": 1}}]}', '{"0": [{"method": "lora", "options": {"rank": 0}}]}',
    '{"0": [{"method": "lora", "options": {"rank": 2.5}}]}', '{"0": [{"method": "lora", "options": {"rank": 1e400}}]}',
    '{"0": [{"method": "lora", "options": {"rank": NaN}}]}',
        '{"0": [{"method": "lora", "options": {"alpha": Infinity}}]}',
    '{"0": [{"method": "lora", "options": {"alpha": "16"}}]}', '{"0": [{"method": "lora", "options": {"rank": null}}]}',
    '{"0": [{"method": "lora", "options": {"layers": [1]}}]}', '{"0": [{"method": "lora", "options": {"nothing": 1}}]}',
    '{"0": [{"method": "lora", "options": []}]}', '{"0": [{"method": "lora", "options": {"targets": "("}}]}',
    '{"0": [{"method": "lora", "options": {"targets": 3}}]}', '{"0": [{"method": "lora", "options": {"targets": ""}}]}',
    '{"0": [{"method": "lora", "options": {"dropout": 1.5}}]}',
        '{"0": [{"method": "lora", "options": {"dropout": -1}}]}',
    '{"0": [{"method": "lora", "options": {"rank_pattern": {"x": 3}}}]}',
        '{"0": [{"method": "lora", "options": {"rank": 1, "rank": 2}}]}',
    '{"0": [{"method": "fishpal"}]}', '{"0": [{"method": "full"}]}', '{"0": [{"method": "head"}]}',
        '{"0": [{"method": "apply"}]}',
    '{"0": [{"method": "__class__"}]}', '{"0": [{"method": []}]}', '{"0": [{"method": null}]}',
        '{"0": [{"options": {}}]}',
    '{"0": [{"method": "lora", "other": 3}]}', '{"0": ["lora"]}', '{"0": [[]]}', '{"0": [{"method": "\\ud800"}]}',
    '{"0": [{"method": "prefix", "options": {"num_virtual_tokens": 0}}]}',
        '{"0": [{"method": "pfeiffer", "options": {"activation": "x"}}]}',
    '{"0": [{"method": "lora", "options": {"rank": 100000000000}}]}', "{", '{"0": [{"method": "lora"}]} x',
        "[" * 100_000, '{"0":' * 100_000, '{"0": [{"method": "lora", "options": {"rank": ' + "9" * 5000 + "}}]}",
        '{"' + "9" * 5000 + '": []}', "\udcff",
    '{"0": [{"method": "lora"}, {"method": "lora"}], "0 ": [{"method": "lora"}]}', '{" 0": [{"method": "lora"}]}',
        '{"0": [{"method": "LoRA"}]}', )


def plan_cases() -> Iterator[Case]:
    own = tuple(a.replace("lora,custom", "fishpal,custom") for a in LORA if "peft" not in a)
    for text in PLANS:
        yield Case("plan", f"{text[:70]!a}", ("main", *own, f"--config.fishpal.plan={text}", "--workdir=new"),
            "refused")
    for name in ("nowhere.json", ".", "train.csv", "plan.json", "fifo.json", "loop.json"):

        def make() -> None:
            put("plan.json", b"\xff\xfe{}")()
            os.mkfifo("fifo.json")
            Path("loop.json").symlink_to("loop.json")

        yield Case("plan", f"file {name}", ("main", *own, f"--config.fishpal.plan={name}", "--workdir=new"), "refused",
            make)

    def build(plan: Any) -> Callable[[], Any]:
        def call() -> Any:
            import jpeft

            return jpeft.build(eval(plan, {"Entry": jpeft.Entry, "nan": float("nan"), "inf": float("inf")}))

        return call

    for text in ("{}", "{0: []}", "{0: [Entry('lora', {'rank': True})]}", "{0: [Entry('lora', {'gate': 'yes'})]}",
        "None", "3", "{'0': [Entry('lora')]}", "{True: [Entry('lora')]}", "{0: Entry('lora')}", "{0: [Entry('none')]}",
                 "{0: [Entry('lora', {'alpha': nan})]}", "{0: [Entry('lora', {'alpha': inf})]}",
                     "{-1: [Entry('lora')]}",
                 "{0: [Entry('lora', {1: 2})]}", "{0: [Entry('lora', None)]}", "{0: [Entry(None)]}",
                     "{0.5: [Entry('lora')]}", "{0: [('lora',)]}", "[3]", "[{}]", "[{'method': 'lora', 'layers': 3}]",
                     "[{'method': 'lora', 'options': 3}]",
                 "{0: [Entry('lora', {'layers': [0]})]}", "{0: 'lora'}", "{10**30: [Entry('lora', {'rank': 10**30})]}",
                 "{0: [Entry('lora', {'rank': '8'})]}", "{0: [Entry('lora', {'rank': [8]})]}", "'lora'",
                     "{None: [Entry('lora')]}"):
        yield Case("plan", f"build({text})", build(text), "sane" if "10**30" in text else "refused")


def data_cases() -> Iterator[Case]:
    rows = table(24, 0)
    head, body = rows.split("\n", 1)
    odd = {"empty": ("", "refused"), "header": (head + "\n", "refused"), "blank": ("\n\n\n", "refused"),
        "one row": (head + "\nthe film was good,p\n", "refused"), "one class": (rows.replace(",n", ",p"), "refused"),
        "other columns": (rows.replace(head, "a,b"), "refused"), "column twice": (rows.replace(head, "text,text"),
            "refused"),
        "label twice": ("text,label,label\n" + "".join(f"a {i},p,n\nb,n,p\n" for i in range(9)), "refused"),
        "unnamed": (rows.replace(head, "text,"), "refused"), "latin-1": (rows.encode() + b"caf\xe9,p\n", "refused"),
        "utf-16": (rows.encode("utf-16"), "refused"), "zeros": (rows.encode() + b"a\0b,p\n", "sane"),
        "open quote": (rows + '"the film,p\n', "refused"), "long row": (rows + "a,p,q\n", "refused"),
            "short row": (rows + "a\n", "refused"),
        "no label": (rows + "a b,\n", "refused"), "no text": (rows + ",p\n", "sane"),
            "label nan": (rows + "a,nan\n", "refused"),
        "label space": (rows + "a, p\n", "refused"), "label case": (rows + "a,P\n", "refused"),
            "labels 1 1.0": (rows.replace(",n\n", ",1\n").replace(",p\n", ",1.0\n"), "refused"),
        "quotes": (rows + 'say ""hi"",p\n', "sane"), "huge field": (rows + "a" * 200_000 + ",p\n", "sane"),
        "long text": (rows + '"' + "good " * 50_000 + '",p\n', "sane"), "emoji": (rows + "\U0001f600 \u202e\u0301,p\n",
            "sane"), "html": ("<html><body>404</body></html>\n", "refused"),
            "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "refused"),
        "many labels": (head + "\n" + "".join(f"a,l{i}\n" for i in range(300)), "sane"),
            "json": (jsonl([{"text": "a", "label": "p"}]), "refused"),
        "sep": (rows.replace(",", ";"), "refused"), "gz": (gzip.compress(rows.encode()), "refused"),
            "null": (rows + "a,NULL\n", "sane"),
        "only true": (rows.replace(",n\n", ",true\n").replace(",p\n", ",true\n"), "refused"),
            "dev label unknown": (rows.replace(",n\n", ",z\n"), "refused"),
        "blank end": (rows + "\n\n\n", "again"), "spaces end": (rows + "\n  \n", "same"),
        "crlf": (rows.replace("\n", "\r\n"), "same"),
            "bom": ("\ufeff" + rows, "same"),
        "no newline": (rows.rstrip("\n"), "same"), "quoted": (re.sub(r"^(.*),(.)$", r'"\1","\2"', body,
            flags=re.M).join((head + "\n", "")), "same"),
        "extra column": ("id," + head + "\n" + "".join(f"{i},{r}\n" for i, r in enumerate(body.split("\n")[:-1])),
            "same"),
        "swapped": ("label,text\n" + "".join(",".join(r.split(",")[::-1]) + "\n" for r in body.split("\n")[:-1]),
            "same"), }
    call = ("main", *LORA, "--workdir=new")
    for name, (content, want) in odd.items():
        yield Case("data", f"csv {name}", call, want, put("train.csv", content))
        if want == "refused" and name not in ("one row", "one class", "label space", "label case", "label nan",
            "labels 1 1.0", "only true"):
            yield Case("data", f"csv dev {name}", call, want, put("dev.csv", content))
    for how in ("gone", "folder", "loop", "fifo", "noise", "empty"):
        for name in ("train.csv", "dev.csv"):
            yield Case("data", f"{name} {how}", call, "refused", lambda name=name, how=how: spoil(name, how, 1))
    plain = [{"text": f"{r} {i}", "label": "np"[i % 2]} for i, r in enumerate(["the film was bad", "a good book"] * 12)]
    deep: Any = "x"
    jsons = {"list line": (jsonl([*plain, [1]]), "refused"), "number": (jsonl([*plain, 3]), "refused"),
            "text 3": (jsonl([*plain, {"text": 3, "label": "p"}]), "refused"),
        "text null": (jsonl([*plain, {"text": None, "label": "p"}]), "refused"),
            "text list": (jsonl([*plain, {"text": ["a"], "label": "p"}]), "refused"),
        "lacks label": (jsonl([*plain, {"text": "a"}]), "refused"), "label null": (jsonl([*plain,
            {"text": "a", "label": None}]), "refused"),
        "label NaN": (jsonl([*plain, {"text": "a", "label": float("nan")}]), "refused"),
            "label dict": (jsonl([*plain, {"text": "a", "label": {}}]), "refused"),
        "label list": (jsonl([*plain, {"text": "a", "label": ["p"]}]), "refused"),
            "deep": (jsonl(plain) + "[" * 100_000 + "\n", "refused"),
        "deep dict": (jsonl(plain) + '{"text":' * 100_000 + "\n", "refused"),
            "digits": (jsonl(plain) + '{"text": "a", "label": ' + "9" * 5000 + "}\n", "refused"),
        "digits aside": (jsonl(plain) + '{"text": "a", "label": "p", "id": ' + "9" * 5000 + "}\n", "sane"),
            "inf": (jsonl(plain) + '{"text": "a", "label": 1e999}\n', "refused"),
        "surrogate": (jsonl(plain) + '{"text": "a \\ud800", "label": "p"}\n', "sane"),
            "surrogate label": (jsonl(plain) + '{"text": "a", "label": "\\ud800"}\n', "sane"),
        "surrogate key": (jsonl(plain) + '{"text": "a", "label": "p", "\\ud800": 1}\n', "sane"),
            "twice": (jsonl(plain) + '{"text": "a", "text": "b", "label": "p"}\n', "refused"),
        "broken": (jsonl(plain) + "{", "refused"), "blank inside": (jsonl(plain[:9]) + "\n\n" + jsonl(plain[9:]),
            "sane"), "not utf-8": (jsonl(plain).encode() + b'{"text": "\xff", "label": "p"}\n', "refused"),
        "array": (json.dumps(plain), "refused"), "bools": (jsonl([r | {"label": r["label"] == "p"} for r in plain]),
            "fine"), "mixed": (jsonl([r | {"label": i % 2 if i % 3 else str(i % 2)} for i, r in enumerate(plain)]),
            "sane"), "true and 1": (jsonl([r | {"label": (True, 1)[i % 2]} for i, r in enumerate(plain)]), "refused"),
            "true text": (jsonl([r | {"label": (True, "true")[i % 2]} for i, r in enumerate(plain)]), "refused"),
        "ints": (jsonl([r | {"label": i % 3 - 1} for i, r in enumerate(plain)]), "fine"),
            "floats": (jsonl([r | {"label": i % 2 / 2} for i, r in enumerate(plain)]), "sane"),
            "empty": ("", "refused"), "zero bytes": ("\0" * 99, "refused"), }
    del deep
    for name, (content, want) in jsons.items():
        own = tuple(a for a in LORA if "data.train" not in a and "data.val" not in a)
        yield Case("data", f"jsonl {name}", ("main", *own, "--config.data.train=t.jsonl", "--workdir=new"), want,
            put("t.jsonl", content))
    for name, kind, labels in (("inf", "regression", "inf"), ("nan", "regression", "nan"), ("text", "regression", "p"),
        ("large", "regression", "1e39"), ("1e400", "regression", "1e400"), ("empty", "regression", ""),
                                   ("true", "regression", "true"), ("one", "multilabel", "a;a"),
                               ("semicolon", "multilabel", ";"), ("words", "tagging", "A B"),
                                   ("constant", "regression", "2.0")):
        content = head + "\n" + "".join(f"the film {i},{i % 2 + 0.5 if kind == 'regression' else 'np'[i % 2]}\n"
            for i in range(20)) + f"the book,{labels}\n"
        content = content if name != "constant" else head + "\n" + "a film,2.0\n" * 30
        own = (*(a for a in LORA if "data.val" not in a), f"--config.data.kind={kind}", "--workdir=new")
        yield Case("data", f"{kind} {name}", ("main", *own), "sane" if name in ("semicolon", "one",
            "constant") else "refused", put("train.csv", content))
    for name, content in {"cut": gzip.compress(jsonl(plain).encode())[:-20], "plain": jsonl(plain).encode(),
        "crc": gzip.compress(jsonl(plain).encode())[:-8] + b"\0" * 8,
        "twice": gzip.compress(gzip.compress(jsonl(plain).encode())),
        "tail": gzip.compress(jsonl(plain).encode()) + b"tail", "empty": b""}.items():
        own = tuple(a for a in LORA if "data.train" not in a and "data.val" not in a)
        yield Case("data", f"gz {name}", ("main", *own, "--config.data.train=t.jsonl.gz", "--workdir=new"),
            "sane" if name in ("plain", "tail") else "refused", put("t.jsonl.gz", content))
        yield Case("data", f"parquet {name}", ("main", *own, "--config.data.train=t.parquet", "--workdir=new"),
            "refused", put("t.parquet", content))
    glue = ("main", "--config=lora,sst2", *(a for a in COMMON if "data." not in a), "--workdir=new",
        "--config.data.path=glue")
    for name, files in {
        "no folder": {}, "no dev": {"train.jsonl": jsonl([{"sentence": "a", "label": 1, "idx": 0}] * 9)},
            "label 7": {"train.jsonl": jsonl([{"sentence": "a", "label": 7, "idx": 0}] * 9)},
        "label -1": {"train.jsonl": jsonl([{"sentence": "a", "label": -1}] * 9)},
            "label text": {"train.jsonl": jsonl([{"sentence": "a", "label": "1"}] * 9)},
        "fields": {"train.jsonl": jsonl([{"text": "a", "label": 1}] * 9)},
            "label 0.5": {"train.jsonl": jsonl([{"sentence": "a", "label": 0.5}] * 9)},
        "label true": {"train.jsonl": jsonl([{"sentence": "a", "label": True}] * 9)}, }.items():

        def write(files: dict[str, str] = files, name: str = name) -> None:
            for file, content in files.items():
                put(f"glue/sst2/{file}", content)()
                if name != "no dev":
                    put("glue/sst2/validation.jsonl", jsonl([{"sentence": "a", "label": i % 2, "idx": i}
                        for i in range(4)]))()

        want = "sane" if name == "label text" else "refused"  # "1" is a label, as in a CSV file
        yield Case("data", f"glue {name}", glue, want, write)


def change_cases() -> Iterator[Case]:
    """A workdir whose inputs are not those it was started with."""
    train = table(24, 0)
    for workdir in ("run", "half"):
        call = ("main", *LORA, f"--workdir={workdir}")

        def case(name: str, damage: Damage, want: str = "refused", call: tuple[str, ...] = call,
            where: str = workdir) -> Case:
            return Case("change", f"{where}: {name}", call, want, damage, where)

        lines = train.split("\n")
        yield case("row added", put("train.csv", train + "a good film,p\n"))
        yield case("row removed", put("train.csv", "\n".join(lines[:-2]) + "\n"))
        yield case("text", put("train.csv", train.replace("film", "meal")))
        yield case("label", put("train.csv", train[:-2] + "n\n"))
        yield case("order", put("train.csv", "\n".join([lines[0], *lines[2:4], lines[1], *lines[4:]])))
        yield case("labels swapped", put("train.csv", train.replace(",n\n", ",q\n").replace(",p\n",
            ",n\n").replace(",q\n", ",p\n")))
        yield case("labels renamed", lambda: [put(f, Path(f).read_text().replace(",n\n", ",x\n"))()
            for f in ("train.csv", "dev.csv")])
        yield case("dev text", put("dev.csv", table(8, 1).replace("was", "not")))
        yield case("dev row", put("dev.csv", table(6, 1)))
        yield case("dev is train", put("dev.csv", train))
        yield case("gone", lambda: Path("train.csv").unlink())
        yield case("case of letters only", put("train.csv", train.replace("film", "FILM")), "same")
        yield case("weights", lambda: [shutil.rmtree("tiny"), tiny(Path("tiny"), 5)])
        yield case("one weight",
            edit("tiny/model.safetensors", lambda t: t | {"pooler.dense.bias": t["pooler.dense.bias"] + 1e-7}))
        yield case("epsilon", edit("tiny/config.json", lambda c: c | {"layer_norm_eps": 1e-5}))
        yield case("dropout", edit("tiny/config.json", lambda c: c | {"hidden_dropout_prob": 0.3}))
        yield case("activation", edit("tiny/config.json", lambda c: c | {"hidden_act": "relu"}))
        yield case("heads", edit("tiny/config.json", lambda c: c | {"num_attention_heads": 4}))
        yield case("vocabulary", lambda: put("tiny/vocab.txt", Path("tiny/vocab.txt").read_text().replace("good\nbad",
            "bad\ngood"))())
        yield case("upper case",
            put("tiny/tokenizer_config.json", '{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}'), "sane")
        yield case("model gone", lambda: shutil.rmtree("tiny"))
        moved = tuple(a.replace("=tiny", "=moved/tiny").replace("train.csv", "moved/train.csv") for a in call)
        yield case("moved", lambda: [Path("moved").mkdir(), shutil.move("tiny", "moved"),
            shutil.move("train.csv", "moved")], "same", moved)
        for field, value in (("train.learning_rate", "0.1"), ("train.num_epochs", "3"), ("train.batch_size", "4"),
            ("train.max_length", "8"),
                             ("peft.lora.rank", "4"), ("peft.lora.alpha", "3.0"), ("train.weight_decay", "0.0"),
                                 ("data.labels", "('p','n')"),
                             ("train.dtype", "bfloat16"), ("train.export", "best"), ("data.kind", "multilabel")):
            new = (*(a for a in call if f"config.{field}=" not in a), f"--config.{field}={value}")
            yield case(f"{field}={value}", lambda: None, "refused", new)
        yield case("other method", lambda: None, "refused", ("main", "--config=pfeiffer,custom",
            *(a for a in COMMON if "peft" not in a), call[-1]))
        yield case("nothing", lambda: None, "same")
        more = (*(a for a in call if "seeds" not in a), "--config.seeds=(1, 2)")
        yield Case("kinder", f"{workdir}: a seed more", more, "fine", None, workdir, check=lambda out,
            w=workdir: same_seed(w))


def same_seed(workdir: str) -> str | None:
    ours, first = numbers(workdir), numbers("template/run")
    lost = [key for key in first if key.startswith("seed_1/") and ours[key] != first[key]]
    return f"other {lost}" if lost else None if "seed_2/modules.safetensors" in ours else "no seed 2"


def damage_cases(template: Path, seed: int) -> Iterator[Case]:
    """Every file of a finished run and of cut ones, spoiled in every way."""
    for workdir in ("run", "half", "late", "mask", "half_mask", "late_mask", "pal", "half_pal"):
        call = ("main", *RUNS[origin(workdir)], f"--workdir={workdir}")
        files = sorted(p.relative_to(template) for p in (template / workdir).rglob("*"))
        for file in (f for f in files if f.name != ".lock"):
            kept = "checkpoints" not in file.parts
            last = "6" in file.parts or file.name == ".6.json"
            if not (kept if origin(workdir) != "run" else workdir != "late" or last):
                continue
            for how in DAMAGES:
                if file.parent.parent.name == "state" and how not in ("flip", "cut", "gone"):
                    continue
                if (template / file).is_dir() and how not in ("gone", "loop", "fifo", "empty", "folder"):
                    continue
                key = int(hashlib.sha256(f"{file}{how}{seed}".encode()).hexdigest()[:8], 16)
                name = re.sub(r"[0-9a-f]{32}", "HASH", str(file))
                kind = {"run": "damage", "half": "damage", "late": "fallback"}.get(workdir, "measured")
                want = "again" if workdir == "late" else "same"  # the checkpoint before is there
                yield Case(kind, f"{name} {how}", call, want, lambda f=file, h=how, k=key: spoil(str(f), h, k),
                    f"{workdir} other")
    for name, workdir, want, damage in (
        ("rm -r seed_1/model", "run", "again", lambda: shutil.rmtree("run/seed_1/model")),
        ("rm -r seed_1", "run", "again", lambda: shutil.rmtree("run/seed_1")),
        ("rm report.*", "run", "again", lambda: [Path("run/report.json").unlink(), Path("run/report.md").unlink()]),
        ("rm predictions", "run", "again", lambda: Path("run/seed_1/predictions.safetensors").unlink()),
        ("rm result.json", "run", "again", lambda: Path("run/seed_1/result.json").unlink()),
        ("model and checkpoints gone", "run", "again",
            lambda: [shutil.rmtree(f"run/seed_1/{d}") for d in ("model", "checkpoints")]),
        ("rm -r model of FISH", "mask", "again", lambda: shutil.rmtree("mask/seed_1/model")),
        ("rm -r model of FishPAL", "pal", "again", lambda: shutil.rmtree("pal/seed_1/model")),
        ("all but half a mask gone", "late_mask", "sane", lambda: [shutil.rmtree("late_mask/seed_1/checkpoints"),
            spoil("late_mask/seed_1/prepared.safetensors", "flip", seed)]), ):
        yield Case("damage", name, ("main", *RUNS[origin(workdir)], f"--workdir={workdir}"), want, damage, workdir)


def grid_cases(template: Path, seed: int) -> Iterator[Case]:
    """A finished comparison, spoiled or on other data."""
    call = ("compare", "--config=grid.py", "--workdir=grid")

    def compared(out: str) -> str | None:
        ours, right = (Path(folder, "grid/report.md").read_text() for folder in (".", "template"))
        return None if ours == right else "another report"

    for file in sorted(p.relative_to(template) for p in (template / "grid").rglob("*")):
        for how in DAMAGES:
            if "checkpoints" in file.parts or file.name == ".lock" or "head" in str(file):
                continue
            if (template / file).is_dir() and how not in ("gone", "loop", "fifo", "empty", "folder"):
                continue
            key = int(hashlib.sha256(f"{file}{how}{seed}".encode()).hexdigest()[:8], 16)
            yield Case("grid", f"{file} {how}", call, "same", lambda f=file, h=how, k=key: spoil(str(f), h, k),
                "grid grid.py other", compared)
    for name, damage in {
        "weights": lambda: [shutil.rmtree("tiny"), tiny(Path("tiny"), 5)], "rows": put("train.csv", table(26, 0)),
        "dev": put("dev.csv", table(8, 5)), "labels": replace("train.csv", ",n", ",p"),
        "cells swapped": lambda: shutil.copy("grid/cells/custom-head-1.json", "grid/cells/custom-lora-1.json"),
        "score": lambda: re_edit("grid/cells/custom-lora-1.json", r"0\.5", "0.9"),
        "epochs": replace("grid.py", "num_epochs=1", "num_epochs=2"), "rate": replace("grid.py", "return c",
            "c.run.train.learning_rate = 0.1; return c"), }.items():
        yield Case("grid", name, call, "refused", damage, "grid grid.py")


def origin(workdir: str) -> str:
    """The run that a workdir is, or was cut from: itself, run for half and late, mask for half_mask."""
    return workdir if workdir in RUNS else workdir.partition("_")[2] or "run"


def described_cases(seed: int) -> Iterator[Case]:
    """What predict, export, report, submit and jpeft.load do with spoiled modules and records."""
    answers = ("predict", "--model=run", "--input=dev.csv", "--output=out.jsonl")
    hf = ("export", "--model=run", "--format=hf", "--output=out")

    def answered(out: str) -> str | None:
        return None if Path("out.jsonl").read_bytes() == Path("template/answers.jsonl").read_bytes() else "others"

    def exported(out: str) -> str | None:
        ours, right = (Path(folder, "model.safetensors").read_bytes() for folder in ("out", "template/exported"))
        return None if ours == right else "another model"

    def reported(out: str) -> str | None:
        return None if out.strip() == Path("template/report.txt").read_text().strip() else "another table"

    jp, mod = "run/seed_1/model/jpeft.json", "run/seed_1/model/modules.safetensors"
    edits: dict[str, Damage] = {
        "alpha": lambda: re_edit(jp, r'("rank": 2)', r'\g<1>, "alpha": 32.0'),
            "rank": lambda: re_edit(jp, r'("rank": )2',
            r"\g<1>4"), "labels": lambda: re_edit(jp, r'"n",(\s*)"p"', r'"p",\1"n"'), "version": lambda: re_edit(jp,
            r'("(?:version|format)": )("?)[^,]*', r"\g<1>\g<2>99\g<2>"),
        "no hash": edit(jp, lambda c: {k: v for k, v in c.items() if k != "sha256"}), "list": put(jp, "[]"),
            "deep": put(jp, "[" * 100_000),
        "digits": put(jp, '{"a": ' + "9" * 5000 + "}"), "surrogate": put(jp, '{"a": "\\ud800"}'),
            "not utf-8": put(jp, b"\xff{}"),
        "NaN": edit(mod, lambda t: {k: v * np.nan if v.dtype.kind == "f" else v for k, v in t.items()}),
            "scaled": edit(mod, lambda t: {k: v * 2 for k, v in t.items()}),
        "no leaves": edit(mod, lambda t: {"a": np.zeros(1, "f")}), "weights": lambda: [shutil.rmtree("tiny"),
            tiny(Path("tiny"), 5)], "base gone": lambda: shutil.rmtree("tiny"),
        "vocabulary": lambda: put("tiny/vocab.txt", Path("tiny/vocab.txt").read_text().replace("good\nbad",
            "bad\ngood"))(), "two models": lambda: shutil.copy("other/seed_1/model/modules.safetensors", mod),
            "two descriptions": lambda: shutil.copy("other/seed_1/model/jpeft.json", jp),
        "epsilon": edit("tiny/config.json", lambda c: c | {"layer_norm_eps": 1e-2}), }
    for name, damage in edits.items():
        for call, check in ((answers, answered), (hf, exported)):
            # Modules carry their own vocabulary, and know their base by its absolute path, which is the template's.
            want = "sane" if name in ("vocabulary", "weights", "base gone", "epsilon") else "refused"
            yield Case("modules", f"{call[0]}: {name}", call, want, damage, "run other", check)
    for file in ("model/jpeft.json", "model/modules.safetensors", "result.json", "predictions.safetensors",
        "../config.json", "../report.json", "../inputs.json", "model"):
        for how in DAMAGES if file != "model" else ("gone", "loop", "fifo", "empty"):
            path = os.path.normpath(f"run/seed_1/{file}")
            key = int(hashlib.sha256(f"{file}{how}{seed}".encode()).hexdigest()[:8], 16)
            for call, check in ((answers, answered), (hf, exported), (("report", "run"), reported),
                (("submit", "--model=run", "--output=a.zip"), None)):
                if call[0] == "report" and file.startswith("model"):
                    continue  # it reads records alone
                want = "refused" if call[0] == "submit" else "sane"
                yield Case("modules", f"{call[0]}: {path} {how}", call, want, lambda p=path, h=how,
                    k=key: spoil(p, h, k), "run other", check)


def re_edit(path: str, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, Path(path).read_text(), count=1)
    assert count, f"{pattern} is not in {path}"
    Path(path).write_text(text)


def workdir_cases() -> Iterator[Case]:
    for path in ("", "/dev/null", "/dev/null/x", "/proc/nothing", "/proc/self/x", "/sys/x", "train.csv", "train.csv/x",
        "x" * 300, "y/" * 3000, "a\nb", "loop",
                 "loop/x", "tiny", ".", "..", "/", "fifo", "glued", "\udcff", "~nobody/x"):

        def make() -> None:
            Path("loop").symlink_to("loop")
            os.mkfifo("fifo")
            put("glued/config.json", '{"a": 3}')()

        want = "sane" if path in ("a\nb", "\udcff", "~nobody/x", ".", "..") else "refused"
        if path not in ("", "..", "/", "."):  # those would write outside
            yield Case("workdir", f"--workdir={path[:20]!a}", ("main", *LORA, f"--workdir={path}"), want, make)
        if path not in ("a\nb", "\udcff", "~nobody/x", "tiny", ".", "..", "/"):
            yield Case("workdir", f"report {path[:20]!a}", ("report", path), "refused", make)
        for call in (("predict", f"--model={path}", "--input=dev.csv", "--output=o.jsonl"),
            ("export", f"--model={path}", "--format=hf", "--output=o")):
            yield Case("workdir", f"{call[0]} --model={path[:20]!a}", call, "refused", make)
    for size in (0, 100, 700, 1500, 3000, 6000, 12_000, 40_000):

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

        yield Case("full disk", f"main, {size} bytes a file", ("main", *LORA, "--workdir=new"), "sane", limit)
        for call in (("main", *LORA, "--workdir=half"), ("predict", "--model=run", "--input=dev.csv",
            "--output=o.jsonl"), ("export", "--model=run", "--format=hf", "--output=o")):
            yield Case("full disk", f"{call[0]} {call[-1][-4:]}, {size} bytes a file", call, "sane", limit, "run half")
    for name in ("report.json", "report.md", "metrics.jsonl", "seed_1", "seed_1/model", "seed_1/result.json",
        "seed_1/checkpoints", "config.json", "inputs.json", "curves.png", ".lock"):
        for how in ("folder", "loop", "fifo", "full"):

            def occupy(name: str = name, how: str = how) -> None:
                file = Path("new") / name
                file.parent.mkdir(parents=True, exist_ok=True)
                if how == "full":
                    file.symlink_to("/dev/full")
                else:
                    spoil(str(file), how, 0)

            yield Case("workdir", f"new/{name} {how}", ("main", *LORA, "--workdir=new"), "sane", occupy)


def predict_cases() -> Iterator[Case]:
    good = ("predict", "--model=run", "--input=in.jsonl", "--output=out.jsonl")
    lines = jsonl([{"text": "the film was good"}, {"text": "a bad book"}])
    for name, content, errors in (("number", lines + '{"text": 3}\n', 1), ("null", lines + '{"text": null}\n', 1),
            ("broken", lines + "{\n" + lines, 1), ("list", lines + "[]\n", 1),
        ("deep", lines + "[" * 100_000 + "\n", 1), ("digits", lines + '{"text": ' + "9" * 5000 + "}\n", 1),
            ("surrogate", lines + '{"text": "\\ud800"}\n', None),
        ("latin-1", lines.encode() + b'{"text": "\xff"}\n', 1), ("blank end", lines + "\n\n\n", 0),
            ("lacks", lines + '{"other": "a"}\n', 1),
        ("long", lines + json.dumps({"text": "good " * 99_999}) + "\n", 0), ("empty text", lines + '{"text": ""}\n',
            None), ("twice", lines + '{"text": "a", "text": "b"}\n', None), ):

        def check(out: str, errors: int | None = errors, content: Any = content) -> str | None:
            file, rows = Path("out.jsonl.errors.jsonl"), Path("out.jsonl").read_text().splitlines()
            found = len(file.read_text().splitlines()) if file.exists() else 0
            if errors is not None and found != errors:
                return f"{found} errors, not {errors}"
            return None if len(rows) >= 2 and all(np.isfinite(list(json.loads(r)["probabilities"].values())).all()
                for r in rows if "probabilities" in json.loads(r)) else "answers"

        yield Case("predict", f"jsonl {name}", good, "fine", put("in.jsonl", content), "run", check)
    for name, content in {"empty": "", "list first": "[]\n", "fields": '{"a": "b"}\n', "zeros": "\0" * 50}.items():
        yield Case("predict", f"jsonl {name}", good, "sane", put("in.jsonl", content), "run")
    for option in ("--input=nowhere.csv", "--input=tiny", "--input=x.exe", "--input=", "--output=out.exe",
        "--output=train.csv/x.jsonl", "--output=in.jsonl",
                   "--output=/proc/x.jsonl", "--output=tiny", "--text=nothing", "--text=text,text", "--text=text,label",
                       "--text=", "--model=tiny", "--model=run/seed_9/model", "--wrong=3", "--input=loop.jsonl",
                       "--output=full.jsonl"):

        def make() -> None:
            put("in.jsonl", lines)()
            Path("loop.jsonl").symlink_to("loop.jsonl")
            Path("full.jsonl").symlink_to("/dev/full")

        call = (*(a for a in good if not a.startswith(option.split("=")[0])), option)
        yield Case("predict", option[:40], call, "sane" if "nowhere/" in option else "refused", make, "run")
    for name, change in {
        "answer edited": lambda: re_edit("out.jsonl", r"0\.\d\d", "0.11"), "cut": lambda: put("out.jsonl",
            Path("out.jsonl").read_bytes()[:-9])(), "input changed": put("in.jsonl", lines * 2),
        "gone": lambda: Path("out.jsonl").unlink(), "model changed": lambda: [shutil.rmtree("run"),
            shutil.copytree("other", "run")], "same": lambda: None, }.items():

        def again(change: Damage = change) -> None:
            put("in.jsonl", lines)()
            fork(good, lambda: None, Path.cwd(), 120)
            change()

        yield Case("predict", f"again: {name}", good, "sane", again, "run other", lambda out: None
            if len(Path("out.jsonl").read_text().splitlines()) in (2, 4) else "rows")
    for option in ("--format=", "--format=exe", "--format=HF", "--output=tiny", "--output=train.csv", "--output=run",
        "--output=", "--output=loop", "--output=train.csv/x", "--output=/proc/x", "--license="):
        call = ("export", "--model=run", *(a for a in ("--format=hf", "--output=out")
            if not a.startswith(option.split("=")[0])), option)
        yield Case("export", option, call, "sane" if "license" in option else "refused",
            lambda: Path("loop").symlink_to("loop"), "run")
    for form in ("hf", "peft", "adapters", "stablehlo", "onnx"):
        yield Case("export", f"format {form}", ("export", "--model=run", f"--format={form}", "--output=out"), "sane",
            None, "run")
    for option in ("--output=a.txt", "--output=", "--output=tiny.zip/a.zip", "--model=tiny", "--model=nowhere",
        "--model=other", "--data=nowhere", "--data=train.csv", "--output=train.csv"):
        call = ("submit", *(a for a in ("--model=run", "--output=a.zip") if not a.startswith(option.split("=")[0])),
            option)
        yield Case("submit", option, call, "refused", None, "run other")


def library_cases() -> Iterator[Case]:
    def predicts(texts: str, pair: bool = False) -> Callable[[], Any]:
        def call() -> Any:
            import jpeft

            saved = jpeft.load("run/seed_1/model" if not pair else "pairs/seed_1/model")
            logits = jpeft.predict(saved, eval(texts, {"np": np}))
            assert len(logits) == len(eval(texts, {"np": np}))
            assert np.isfinite(np.asarray(logits)).all()

        return call

    for texts in ("'hello world'", "b'hello'", "None", "3", "[3]", "[None]", "[('a', 'b')]", "['a', ('b', 'c')]",
        "[['a', 'b']]", "[b'a']", "[()]", "{'a': 1}",
                  "[('a', 'b', 'c')]", "[float('nan')]", "np.array([1])", "[('a', None)]", "[['a', 3]]", "{'a'}",
                      "(x for x in 'ab')", "[['a', 'b'], 'c']"):
        yield Case("library", f"predict({texts})", predicts(texts), "refused", None, "run")
    for texts in ("[]", "['']", "[['a']]", "['\\ud800']", "['a' * 10**6]", "np.array(['a', 'b'])", "('a', 'b')",
        "[np.str_('a')]", "['\\0']"):
        yield Case("library", f"predict({texts})", predicts(texts), "sane", None, "run")
    for texts in ("['a sentence']", "['ab']", "'ab'", "[('a',)]", "[('a', 'b', 'c')]", "['ab', 'cd']",
        "np.array(['ab'])"):
        yield Case("library", f"pair model: predict({texts})", predicts(texts, True), "refused", None, "pairs")
    yield Case("library", "pair model: predict([('a', 'b')])", predicts("[('a', 'b')]", True), "fine", None, "pairs")
    for path in ("nowhere", "run", "tiny", "", "train.csv", "/dev/null", "run/seed_1", "\0", "x" * 9999):

        def load(path: str = path) -> Any:
            import jpeft

            jpeft.load(path)

        yield Case("library", f"load({path[:20]!a})", load, "sane" if path == "" else "refused", None, "run")
    for name in ("read_leaves",):
        for path in ("nowhere", "tiny", "train.csv", "tiny/config.json", "fifo", "loop", "cut",
            "tiny/model.safetensors", "run/seed_1/model/modules.safetensors", "", "\0"):

            def read(path: str = path, name: str = name) -> Any:
                import jpeft

                os.mkfifo("fifo")
                Path("loop").symlink_to("loop")
                put("cut", Path("tiny/model.safetensors").read_bytes()[:-3])()
                getattr(jpeft, name)(path)

            yield Case("library", f"{name}({path!a})", read, "sane" if path.startswith("run")
                and name == "read_leaves" else "refused", None, "run")
    for leaves in ("{}", "{'a': object()}", "{1: np.ones(2)}", "{'a': 'text'}", "[1]", "None", "{'a': {'b': None}}",
        "{'a:b': np.ones(1), 'a': {'b': np.ones(1)}}", "{'\\ud800': np.ones(1)}", "{'': np.ones(1)}",
        "{'a': np.array(['x'])}", "{'a': 1+2j}", "{'a': float('nan')}"):

        def write(leaves: str = leaves) -> Any:
            import jpeft

            given = eval(leaves, {"np": np})
            jpeft.write_leaves("leaves.safetensors", given)
            back = jpeft.read_leaves("leaves.safetensors")
            assert sorted(map(str, back)) == sorted(map(str, given)) or ":" in str(list(given)), f"{back}"

        yield Case("library", f"write_leaves({leaves})", write, "sane")


def kinder_cases(seed: int) -> Iterator[Case]:
    for program in PROGRAMS:
        yield Case("kinder", f"{program} --help", (program, "--help"), "fine")
        yield Case("kinder", f"{program} without arguments", (program,), "refused")
        yield Case("kinder", f"{program} --nonsense", (program, "--nonsense=3"), "refused")
    yield Case("kinder", "--version", ("main", "--version"), "fine", check=lambda out: None
        if re.search(r"\d+\.\d+", out) else "no version")
    yield Case("kinder", "seeds twice", ("main", *LORA, "--config.seeds=(2,)", "--workdir=new"), "refused")
    yield Case("kinder", "workdir twice", ("main", *LORA, "--workdir=a", "--workdir=b"), "refused")
    yield Case("kinder", "layers empty", ("main", *LORA, "--config.peft.lora.layers=()", "--workdir=new"), "refused")
    yield Case("kinder", "layers twice", ("main", *LORA, "--config.peft.lora.layers=(0, 0)", "--workdir=new"), "sane")
    yield Case("kinder", "layer 7", ("main", *LORA, "--config.peft.lora.layers=(7,)", "--workdir=new"), "refused")
    for text, want in (('{"layer_0/.*/query": 1}', "fine"), ("{}", "sane"), ('{"nothing": 1}', "refused"),
        ('{"(": 1}', "refused"), ('{"layer_0/.*": true}', "refused"), ('{"layer_0/.*": 0}', "refused"),
        ("[]", "refused"), ("{", "refused"), ('{"layer_0/.*": "x"}', "refused")):
        yield Case("kinder", f"rank_pattern={text}", ("main", *LORA, f"--config.peft.lora.rank_pattern={text}",
            "--workdir=new"), want)
    for rate in ("1e10", "1e30", "1e38"):
        own = ("main", *LORA, f"--config.train.learning_rate={rate}", "--workdir=new")
        yield Case("kinder", f"learning rate {rate}", own, "sane")
    yield Case("kinder", "majority", ("report", "run"), "fine", None, "run",
        lambda out: None if "majority" in out else "no majority")
    yield Case("kinder", "report of two", ("report", "run", "other"), "fine", None, "run other",
        lambda out: None if "ot alike" in out else "not said that data differ")
    yield Case("kinder", "report of one twice", ("report", "run", "run"), "sane", None, "run")
    yield Case("kinder", "report half", ("report", "half"), "refused", None, "half")
    init = ("main", *LORA, "--config.init_from=run/seed_1/model", "--workdir=new")
    yield Case("kinder", "init_from", init, "fine", put("train.csv", table(24, 0) + "it was,zz\n"), "run")
    for name, damage in {
        "NaN": edit("run/seed_1/model/modules.safetensors", lambda t: {k: v * np.nan for k, v in t.items()}),
        "gone": lambda: shutil.rmtree("run/seed_1/model"),
        "base": lambda: [shutil.rmtree("tiny"), tiny(Path("tiny"), 5)],
        "flip": lambda: spoil("run/seed_1/model/modules.safetensors", "flip", 3), }.items():
        yield Case("kinder", f"init_from {name}", init, "refused", damage, "run")
    yield Case("kinder", "init_from other rank", (*(a for a in init if "rank" not in a), "--config.peft.lora.rank=3"),
        "refused", None, "run")
    yield Case("kinder", "init_from itself", (*init[:-1], "--workdir=run"), "refused", None, "run")

    def held(kill: bool) -> Callable[[], None]:
        """Another process on the workdir, which stands still, or was killed."""

        def start() -> None:
            pid = os.fork()
            if pid == 0:
                child(("main", *LORA, "--workdir=new"), "first")
            until = time.monotonic() + 90
            while not Path("new/.lock").exists() and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
            STOPPED.append(pid)

        return start

    yield Case("kinder", "two processes", ("main", *LORA, "--workdir=new"), "refused", held(False))
    yield Case("kinder", "after a killed process", ("main", *LORA, "--workdir=new"), "same", held(True), "run")
    rng = random.Random(seed)
    for i in range(8):

        def killed(moments: tuple[float, ...] = tuple(rng.uniform(0.3, 4) for _ in range(3))) -> None:
            for moment in moments:
                pid = os.fork()
                if pid == 0:
                    child(("main", *LORA, "--workdir=new"), "killed")
                until = time.monotonic() + 60
                while cpu(pid) < moment and time.monotonic() < until and os.waitpid(pid, os.WNOHANG)[0] == 0:
                    time.sleep(0.02)
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

        yield Case("killed", f"three times, {i}", ("main", *LORA, "--workdir=new"), "same", killed, "run")


# fmt: on


# Running them.

STOPPED: list[int] = []  # processes of a case that wait for its end
SAID = [""]


def child(call: Any, name: str, before: Damage = lambda: None, folder: Path | str = ".", pipes: Any = ()) -> None:
    """In a fork: runs a call with its output in files, and never returns."""
    code = 1
    try:
        os.chdir(folder)
        before()
        for fd, end in enumerate(pipes or [os.open(f"{name}.out", os.O_CREAT | os.O_WRONLY)] * 2, 1):
            os.dup2(end, fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        try:
            if callable(call):
                call()
            else:
                sys.argv = [f"jpeft.{call[0]}", *call[1:]]
                runpy.run_module(f"jpeft.{call[0]}", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException as error:
            if type(error).__name__ == "UserError":
                print("error:", error, file=sys.stderr)
                code = 2
            else:
                traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fork(call: Any, before: Damage, folder: Path, limit: float) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr; None where it did not end, or stood still for 20 seconds."""
    pipes = [os.pipe() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        child(call, ".case", before, folder, [write for _, write in pipes])
    read = [b"", b""]
    for end, write in pipes:
        os.close(write)
        os.set_blocking(end, False)

    def drain() -> None:
        for i, (end, _) in enumerate(pipes):
            with contextlib.suppress(BlockingIOError):
                read[i] += os.read(end, 1 << 20)

    began = moved = time.monotonic()
    used, code = 0.0, None
    while time.monotonic() - began < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        drain()
        now = cpu(pid)
        if now > used + 0.02:
            used, moved = now, time.monotonic()
        if time.monotonic() - moved > 20:
            break
        time.sleep(0.01)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    drain()
    for end, _ in pipes:
        os.close(end)
    return code, read[0].decode(errors="replace"), read[1].decode(errors="replace")


def snapshot(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(("template", ".case", "killed.", "first.")) or path.name == ".lock":
            continue
        if path.is_symlink() or not path.is_file():
            found[name] = "link" if path.is_symlink() else "folder" if path.is_dir() else "other"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(case: Case, folder: Path, code: int | None, out: str, err: str, before: dict[str, str]) -> str | None:
    """What is wrong with how a case ended."""
    told = [line for line in err.splitlines() if line.strip() and not line.startswith(("warning", "WARNING"))]
    SAID.append(f"exit code {code} {told[:1]}"[:300])
    if code is None:
        return "HANGS"
    if "Traceback" in err or "Traceback" in out:
        return f"TRACEBACK, exit code {code}: {told[-1][:300] if told else ''}"
    if code == 2:
        after = snapshot(folder)
        reports = ("report.json", "report.md")  # are written again, with other seconds
        lost = [n for n, h in before.items() if after.get(n) != h and not (n in after and n.endswith(reports))]
        if lost:
            return f"CHANGED what was there: {', '.join(lost[:4])} ({told[:1]})"
        if case.want in ("fine", "again"):
            return f"REFUSED: {told[:1]}"
        return None if len(told) == 1 else f"{len(told)} LINES on stderr: {[t[:150] for t in told[:4]]}"
    if code:
        return f"EXIT CODE {code}: {told[-1][:300] if told else out[-200:]}"
    if case.want == "refused":
        return "ACCEPTED, exit code 0"
    try:
        if case.check:
            wrong = case.check(out)
        elif callable(case.call) or case.call[0] != "main" or "--help" in case.call or "--version" in case.call:
            wrong = None
        else:
            workdir = case.call[[i for i, a in enumerate(case.call) if "--workdir=" in a][-1]].split("=", 1)[1]
            wrong = finite(workdir)
            if case.want in ("same", "again") and not wrong:
                ours, right = numbers(workdir), numbers(f"template/{origin(workdir if workdir != 'new' else 'run')}")
                wrong = next(
                    (f"{key}: {ours.get(key)} is not {right[key]}" for key in right if ours.get(key) != right[key]),
                    None,
                )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        wrong = f"cannot be read: {type(error).__name__} {error}"
    return f"SILENTLY WRONG, exit code 0: {wrong}" if wrong else None


def prepare(folder: Path) -> None:
    """The runs that cases start from, made by the programs themselves."""
    folder.mkdir(parents=True)
    tiny(folder / "tiny")
    (folder / "train.csv").write_text(table(24, 0))
    (folder / "dev.csv").write_text(table(8, 1))
    (folder / "grid.py").write_text(GRID)
    (folder / "foreign.csv").write_text(table(24, 3, "ly"))
    pairs = ["a,b,label", *(f"the film {i},was {('good', 'bad')[i % 2]},{'np'[i % 2]}" for i in range(20))]
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    pair = (a for a in LORA if "data.val" not in a and "data.t" not in a)
    for call in (
        *(("main", *flags, f"--workdir={name}") for name, flags in RUNS.items()),
        ("main", *(a.replace("train.csv", "foreign.csv") for a in LORA), "--workdir=other"),
        ("main", *pair, "--config.data.train=pairs.csv", "--config.data.text=a,b", "--workdir=pairs"),
        ("predict", "--model=run", "--input=dev.csv", "--output=answers.jsonl"),
        ("export", "--model=run", "--format=hf", "--output=exported"),
        ("compare", "--config=grid.py", "--workdir=grid"),
        ("report", "run"),
    ):
        code, out, err = fork(call, lambda: None, folder, 600)
        if code:
            raise SystemExit(f"{' '.join(call)}: exit code {code}\n{out}\n{err}")
        (folder / "report.txt").write_text(out)
    for name in RUNS:
        ends = (f"half_{name}", f"late_{name}") if name != "run" else ("half", "late")
        for end in ends:  # as after a kill: late before the modules were written, half after the first of two epochs
            seed = shutil.copytree(folder / name, folder / end) / "seed_1"
            shutil.rmtree(seed / "model")
            lost = [seed / "result.json", seed / "predictions.safetensors"]
            lost += [seed.parent / file for file in ("report.json", "report.md", "curves.png")]
            if end.startswith("half"):
                last = max(int(p.name) for p in (seed / "checkpoints").iterdir() if p.name.isdigit())
                shutil.rmtree(seed / "checkpoints" / str(last))
                lost.append(seed / "checkpoints" / f".{last}.json")
            for file in lost:
                file.unlink()


def run(case: Case, folder: Path, template: Path) -> str | None:
    folder.mkdir(parents=True)
    for name in ("tiny", "train.csv", "dev.csv", *case.needs.split()):
        copy = shutil.copytree if (template / name).is_dir() else shutil.copy
        copy(template / name, folder / name)
    here = Path.cwd()
    os.chdir(folder)
    try:
        os.symlink(template, "template")
        early = case.kind != "full disk"
        if case.damage and early:
            case.damage()
        before = snapshot(folder)
        limits = (lambda: None) if early or not case.damage else case.damage
        return judge(case, folder, *fork(case.call, limits, folder, 150), before)
    finally:
        for pid in STOPPED:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        STOPPED.clear()
        os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the folders of cases; must not be there yet")
    parser.add_argument("--seed", type=int, default=0, help="of the bytes that are spoiled, and of what --cases leaves")
    parser.add_argument("--cases", type=int, default=10**9, help="of each class at most, drawn at random")
    parser.add_argument("--only", help="classes, as a,b, or part of the name of a case")
    parser.add_argument("--minutes", type=float, default=10**9, help="ends early")
    given = parser.parse_args()
    root = given.folder.resolve()
    template = root / "template"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
    for program in PROGRAMS:  # imports once what every fork needs
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            sys.argv = [program, "--help"]
            runpy.run_module(f"jpeft.{program}", run_name="__main__", alter_sys=True)
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import sklearn.metrics  # noqa: F401
    from transformers import AutoTokenizer, BertTokenizer  # noqa: F401

    import jpeft.run.experiment  # noqa: F401

    if not template.exists():  # one that was copied from an earlier call saves minutes
        prepare(template)
    cases = [
        *model_cases(),
        *config_cases(),
        *file_cases(),
        *plan_cases(),
        *data_cases(),
        *change_cases(),
        *workdir_cases(),
        *predict_cases(),
        *library_cases(),
        *kinder_cases(given.seed),
        *damage_cases(template, given.seed),
        *described_cases(given.seed),
    ]
    rng, began, ran, found = random.Random(given.seed), time.monotonic(), Counter(), Counter()
    total = Counter(case.kind for case in cases)
    chosen = []
    for kind in total:
        some = [
            c
            for c in cases
            if c.kind == kind and (not given.only or kind in given.only.split(",") or given.only in c.name)
        ]
        chosen += rng.sample(some, given.cases) if len(some) > given.cases else some
    rng.shuffle(chosen)
    for i, case in enumerate(chosen):
        if time.monotonic() - began > 60 * given.minutes:
            break
        folder = root / f"case_{i}"
        try:
            wrong = run(case, folder, template)
        except (AssertionError, OSError) as error:
            wrong = f"THE CASE ITSELF: {error}"
        ran[case.kind] += 1
        with (root / "cases.txt").open("a", errors="backslashreplace") as log:
            log.write(f"{case.kind}: {case.name}: {wrong or SAID[-1]}\n")
        if wrong:
            found[case.kind] += 1
            call = (
                "Python" if callable(case.call) else " ".join(a if len(a) < 200 else f"{a[:60]}..." for a in case.call)
            )
            print(f"{case.kind}: {case.name}: {wrong}\n    {folder}: {call!a}", flush=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{sum(ran.values())} cases in {time.monotonic() - began:.0f} s, {sum(found.values())} findings")
    for kind in total:
        print(f"  {kind:12} {ran[kind]:4} of {total[kind]:4} cases, {found[kind]:3} findings")
    sys.exit(bool(sum(found.values())))


if __name__ == "__main__":
    main()
