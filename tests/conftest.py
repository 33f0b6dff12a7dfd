"""JAX's strictest settings for all tests, and what several of them share."""

import gc
import json
import os
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if sys.dont_write_bytecode:
    # All that the workers and the processes of tests import would be compiled anew in each: two thirds of their start.
    # Kept apart, it leaves no file beside the sources.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Programs that run once need not be fast. Set here, so that the processes that tests start have it too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# One cache of compiled programs for all workers, kept from one run of the tests to the next.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Nobody reads from a compiled test which line of Python an operation came from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.models import Bert, BertConfig

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects, and few of them are garbage


OPTION = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def _compile_cheaply() -> str:
    """Spares a third of the time to compile: without optimisation, XLA's older code generator is much the faster one.

    With it, it is much the slower one, so programs that are optimised are compiled as users compile them. JAX has no
    public setting for this; where the private one is gone, the tests only take longer. Returns the flag that does the
    same in the processes that tests start.
    """
    try:
        from jax._src import compiler

        jax.jit(lambda x: x + 1, compiler_options=OPTION).lower(0).compile()  # does this version know it?
        standard = compiler.get_compile_options
    except (ImportError, AttributeError, jax.errors.JaxRuntimeError):
        return ""

    def cheap(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        own = OPTION if jax.config.read("jax_disable_most_optimizations") else {}
        return standard(*args, env_options_overrides={**own, **(env_options_overrides or {})}, **kwargs)

    compiler.get_compile_options = cheap
    return "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


CHEAP = _compile_cheaply()


# Start with the files that take longest, so that no worker is left waiting for another's last file.
LONGEST = (
    "test_experiment", "test_registry", "test_hosts", "test_fisher", "test_criteria", "test_finished", "test_export",
    "test_resume", "test_loop", "test_examples", "test_train", "test_placement", "test_lifted", "test_step",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_not_searched_for_garbage() -> Iterator[None]:
    """JAX keeps all that it compiled, gigabytes in the end, and every full collection would walk through it."""
    yield
    gc.collect()
    gc.freeze()


def all_but_slow(names: Iterable[str], others: Collection[str]) -> list[Any]:
    """Parameters of a test, of which CI runs some, of each kind, and `make test-slow` the others."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in others else name for name in names]


@pytest.fixture
def optimised() -> Iterator[None]:
    """For tests of speed, memory and the last bit: programs are compiled as users compile them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def half_optimised(optimised: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs that run long, and need not run as users run them: a third of the time to compile."""
    if CHEAP:
        from jax._src import compiler

        standard, some = compiler.get_compile_options, {**OPTION, "xla_backend_optimization_level": 1}

        def half(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            return standard(*args, env_options_overrides={**some, **(env_options_overrides or {})}, **kwargs)

        monkeypatch.setattr(compiler, "get_compile_options", half)


@pytest.fixture
def programs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid forgets the programs of a finished cell, and with them those of all other tests of the process."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


class Toy(NamedTuple):
    """A random BERT of two layers with a batch: rows of different lengths, labels, and the model's sites."""

    model: Bert
    params: dict[str, Any]
    ids: jax.Array
    mask: jax.Array
    labels: jax.Array
    sites: jpeft.core.site.Sites

    def logits(self, method, leaves, params=None, ids=None, mask=None, **kwargs):
        """Logits with a method's leaves in place."""
        params = self.params if params is None else params
        ids, mask = (self.ids, self.mask) if ids is None else (ids, mask)
        return jpeft.apply(self.model, method, {"params": params, "peft": leaves}, ids, mask, mask=mask, **kwargs)[0]


def randomised(leaves: Any, seed: int = 7, scale: float = 0.3) -> Any:
    """The same tree with every entry drawn anew: what starts at zero hides what it does."""
    rng = np.random.default_rng(seed)  # NumPy: JAX would compile programs for every shape, for asarray another one
    return jax.tree.map(lambda x: jax.device_put(np.float32(scale * rng.normal(size=x.shape))), leaves)


def setting(toy: Toy, method: jpeft.Transform | jpeft.Chain, key: jax.Array) -> jpeft.Setting:
    """What `prepare` sees: single examples of the toy batch, with the plain cross entropy."""
    leaves = jpeft.init(method, key, toy.sites, toy.params)

    def logits(variables, example):
        ids, mask, _ = example
        return jpeft.apply(toy.model, method, variables, ids[None], mask[None], mask=mask[None])[0][0]

    def loss(variables, example):
        return -jax.nn.log_softmax(logits(variables, example))[example[2]]

    def sample(n):
        return jax.tree.map(lambda x: x[:n], (toy.ids, toy.mask, toy.labels))

    return jpeft.Setting(
        loss=loss,
        logits=logits,
        variables={"params": toy.params, "peft": leaves},
        instance="",
        sites=toy.sites,
        sample=sample,
        fisher=lambda fn, tree, n, *rest, **options: jpeft.fisher(fn, tree, sample(n), *rest, **options),
        key=key,
    )


@pytest.fixture(scope="session")
def toy() -> Toy:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    model = Bert(config)
    ids = jax.random.randint(jax.random.key(1), (4, 7), 1, 50)
    mask = (jax.numpy.arange(7)[None] < jax.numpy.array([7, 4, 5, 6])[:, None]).astype(jax.numpy.int32)
    params = randomised(jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"]), seed=3)
    return Toy(model, params, ids, mask, jax.numpy.array([0, 1, 2, 1]), jpeft.sites(model, ids, mask))


WORDS = ("the", "a", "dog", "cat", "tree", "house", "runs", "sleeps", "sees", "likes", "big", "small", "red", "old")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers, 16 wide, without a head, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from jpeft.core.tree import replace
    from jpeft.models import pretrained

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("tiny")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    params = jax.jit(Bert(config).init)(jax.random.key(0), jax.numpy.ones((1, 2), int))["params"]
    # A larger spread than Flax's own embeddings have, so that texts differ.
    params = replace(params, "embeddings/word_embeddings/embedding", lambda x: 5 * x)
    params = replace(params, "pooler/bias", lambda x: x + 0.1)  # without one it would be taken for untrained
    pretrained.save(folder / "model", config, params, tokenizer_from=folder / "tokenizer")
    weights = load_file(folder / "model" / "model.safetensors")
    save_file(
        {name: x for name, x in weights.items() if not name.startswith("classifier")},
        folder / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLUE folder with 45 rows to train on and 18 to evaluate on of MRPC and STS-B."""
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(0)
    for task in ("mrpc", "stsb"):
        for split, size in (("train", 45), ("validation", 18)):
            rows = []
            for i in range(size):
                first = [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
                same = i % 2 == 0
                second = first if same else [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
                label = int(same) if task == "mrpc" else 4.5 * same + round(rng.random() / 2, 2)
                rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": label, "idx": i})
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_config(
    tiny_model: Path, tiny_glue: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ConfigDict]:
    """Makes the config of a run of seconds on `tiny_model` and `tiny_glue`; keywords set fields of `train`."""
    from jpeft.run import config as configs

    # A folder that is set leaves JAX's configuration, and the user's own cache, as they are.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "jax"))

    def make(method: str, task: str = "mrpc", **train: Any) -> ConfigDict:
        config = configs.default(task, method)
        config.model, config.data.path = str(tiny_model), str(tiny_glue)
        small = {
            "lora": {"rank": 2},
            "pfeiffer": {"bottleneck": 4},
            "prefix": {"num_virtual_tokens": 3, "mlp_hidden": 8},
        }
        for name in small if method == "fishpal" else method.split("+"):
            config.peft.get(name, {}).update(small.get(name, {}))
        if method == "fishpal":
            config.fishpal.update(criterion="thesis", num_examples=8)
        config.train.update({"num_epochs": 2, "batch_size": 16, "max_length": 16, **train})
        return config

    return make
