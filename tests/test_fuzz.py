"""Every kind of file that the program reads, damaged: each is read as it was, or refused in one line.

Damage is drawn from fixed seeds: files cut short, bits flipped, values of JSON replaced by others, bytes inserted.
"""

import gzip
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data import tokenizer as tokenizers
from jpeft.data.custom import custom
from jpeft.data.tasks import load as load_task
from jpeft.importance.masks import read_mask, write_mask
from jpeft.models import pretrained
from jpeft.plans import plan as plans
from jpeft.report import __main__ as report_program
from jpeft.run import finished, measured
from jpeft.run import workdir as workdirs
from jpeft.store import model_folder
from jpeft.training import checkpoint
from jpeft.training.step import State

CASES = 40
WRONG = [
    None, True, -1, 0, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\ud800", "../../x", [], [[]], {},
    {"a": 1}, [1, "a"],
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's coroutines


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Bytes that are not `whole`."""
    kind = rng.choice(("cut", "flip", "flip", "insert", "empty", "swap"))
    at = rng.randrange(len(whole))
    if kind == "cut":
        return whole[:at]
    if kind == "insert":
        return whole[:at] + rng.randbytes(rng.randint(1, 9)) + whole[at:]
    if kind == "swap":
        return whole[at:] + whole[:at] if at else b"\0" + whole
    if kind == "empty":
        return b"" if rng.random() < 0.5 else bytes(len(whole))
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def rewritten(whole: bytes, rng: random.Random) -> bytes:
    """JSON with one of its values replaced by something else, or one of its names gone."""
    value = json.loads(whole)
    places = []

    def walk(x):
        for key in x if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], dict | list):
                walk(x[key])

    walk(value)
    where, key = rng.choice(places)
    if isinstance(where, dict) and rng.random() < 0.2:
        del where[key]
    else:
        where[key] = rng.choice(WRONG)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def attempt(read, path, whole, seed, original=None):
    """Reads a damaged file; what is read without an error must be the original, if there is one to compare with."""
    rng = random.Random(f"{path.name} {seed}")
    text = path.suffix in (".json", ".jsonl") and rng.random() < 0.5
    path.write_bytes(rewritten(whole, rng) if text and path.suffix == ".json" else damaged(whole, rng))
    try:
        found = read()
    except UserError as error:
        message = str(error)
        assert "\n" not in message, message
        assert 10 < len(message) < 1000
        return
    finally:
        path.write_bytes(whole)
    if original is not None:
        jax.tree.map(np.testing.assert_array_equal, found, original)


@pytest.fixture(scope="module")
def leaves():
    rng = np.random.default_rng(0)
    return {"a": {"b": rng.normal(size=(3, 4)).astype(np.float32)}, "c": rng.normal(size=5).astype(np.float32)}


@pytest.mark.parametrize("kind", ["leaves", "fisher", "mask"])
def test_tensors(tmp_path, leaves, kind):
    path = tmp_path / "x.safetensors"
    if kind == "mask":
        mask = {"a": {"b": np.array([1, 5])}, "c": True}
        write_mask(path, mask, "model")
        read = lambda: read_mask(path, leaves, "model")
    elif kind == "fisher":
        files.write_leaves(path, {"a:b": leaves["a"]["b"]}, {"about": json.dumps({"done": 3})})
        read = lambda: measured.read(path)[0]
    else:
        files.write_leaves(path, leaves)
        read = lambda: files.read_leaves(path)
    original, whole = read(), path.read_bytes()
    for seed in range(CASES):
        attempt(read, path, whole, seed, original)


@pytest.mark.parametrize("kind", ["result", "inputs", "report"])
def test_records(tmp_path, kind, capsys):
    path = tmp_path / ("report.json" if kind == "report" else "x.json")
    if kind == "result":
        row = {"epoch": 1, "step": 3, "train_loss": 0.3, "accuracy": 0.5}
        result = finished.Result([row], "| a |", {"base": 3}, {"train": 1.0, "evaluate": 1}, 3, 3, 10, [], "o", {}, {})
        finished.save(path, result)
        read = lambda: finished.read(path)._asdict()
    elif kind == "inputs":
        inputs = workdirs.Inputs("here", (3, "a"), (3, "b"), {}, ("x", "y"), "", "c", "e", "d", "", 1)
        files.write_record(path, "list of a run's inputs", inputs._asdict())
        read = lambda: files.read_record(path, "list of a run's inputs")
    else:
        files.write_record(path, "report of a run", {"metrics": {"mean": {"accuracy": 0.5}}})

        def read():
            assert report_program.main([str(tmp_path)]) == 2  # nothing else than its own reports is accepted
            raise UserError(capsys.readouterr().err.strip())

    whole = path.read_bytes()
    original = None if kind == "report" else json.dumps(read(), sort_keys=True)
    for seed in range(CASES):
        same = (lambda: read()) if kind == "report" else (lambda: json.dumps(read(), sort_keys=True))
        if kind == "report":
            path.write_bytes(damaged(whole, random.Random(seed)))
            with pytest.raises(UserError) as caught:
                same()
            assert "\n" not in str(caught.value)
        else:
            rng = random.Random(seed)
            path.write_bytes(rewritten(whole, rng) if seed % 2 else damaged(whole, rng))
            try:
                assert same() == original  # spaces between values mean nothing
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_plans(tmp_path):
    plan = {0: [plans.Entry("lora", {"rank": 4, "dropout": 0.1})], 1: [plans.Entry("pfeiffer", {"bottleneck": 4})]}
    path = tmp_path / "plan.json"
    path.write_text(plans.dumps(plan))
    whole = path.read_bytes()
    for seed in range(2 * CASES):
        attempt(lambda: plans.build(plans.read(str(path))) and None, path, whole, seed)


@pytest.mark.parametrize("name", ["jpeft.json", "modules.safetensors"])
def test_model_folders(tmp_path, tiny_model, name):
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(0))
    trainable = {"params": {"classifier": loaded.params["classifier"]}, "peft": {}}
    model_folder.save(
        tmp_path,
        trainable,
        [],
        base="x",
        fingerprint="y",
        identity={"config": "c", "tokenizer": "t"},
        task="mrpc",
        labels=("a", "b"),
        max_length=8,
        num_texts=1,
        kind="classification",
    )
    whole = (tmp_path / name).read_bytes()
    read = lambda: json.dumps(model_folder.verify(tmp_path), sort_keys=True)
    original = read()

    def same():
        assert read() == original
        return None

    for seed in range(CASES):
        attempt(same, tmp_path / name, whole, seed)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_base_models(tmp_path, tiny_model, name):
    """Weights carry no hash: what is read must only be a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / name).read_bytes()
    read = lambda: pretrained.load(folder, num_labels=2, key=jax.random.key(0)).config and None
    for seed in range(CASES):
        attempt(read, folder / name, whole, seed)


def test_tokenizers(tmp_path, tiny_model):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (tmp_path / name).read_bytes()
        for seed in range(CASES // 4):
            attempt(lambda: tokenizers.load(tmp_path, 18) and None, tmp_path / name, whole, seed)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_own_data(tmp_path, ending):
    rows = [{"text": f"the dog, no {i} ä", "label": "yes" if i % 3 else "no"} for i in range(12)]
    path = tmp_path / f"train.{ending}"
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text, mtime=0) if ending.endswith("gz") else text)
    else:
        separator = "," if ending == "csv" else "\t"
        quote = '"' if ending == "csv" else ""
        lines = [separator.join(("text", "label"))]
        lines += [separator.join((f"{quote}{row['text']}{quote}", row["label"])) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    whole = path.read_bytes()
    for seed in range(CASES):
        attempt(lambda: custom(str(path), ("text",)).splits() and None, path, whole, seed)


def test_glue_folders(tmp_path, tiny_glue):
    for name in ("train", "validation"):
        path = tmp_path / "mrpc" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((tiny_glue / "mrpc" / path.name).read_bytes())
    whole = path.read_bytes()
    for seed in range(CASES):
        attempt(lambda: load_task("mrpc", tmp_path) and None, path, whole, seed)


def test_checkpoints(tmp_path):
    w = jax.random.normal(jax.random.key(0), (40, 2))
    state = State(jnp.int32(3), {"params": {"w": w}}, optax.sgd(1.0, momentum=0.9).init({"params": {"w": w}}))
    progress = checkpoint.Progress([{"epoch": 1, "step": 3}], 0.5, {"train": 1.0})
    checkpoint.save(tmp_path, state, progress)
    paths = sorted(path for path in (tmp_path / "3").rglob("*") if path.is_file() and path.stat().st_size)
    like = jax.tree.map(jnp.zeros_like, state)
    for seed in range(CASES // 2):
        path = paths[seed % len(paths)]
        original = (state, progress._asdict())
        attempt(lambda: _restored(tmp_path, like), path, path.read_bytes(), seed, original)


def _restored(folder, like):
    found = checkpoint.restore(folder, like)
    if found is None:
        raise UserError("there is no checkpoint any more")
    return found.state, found.progress._asdict()
