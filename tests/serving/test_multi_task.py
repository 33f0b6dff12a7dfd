"""Many tasks on one base: every method of the registry is either mixed with all others, or refused by its name."""

import dataclasses
import functools
import inspect
import re

import chex
import jax
import numpy as np
import pytest
from conftest import all_but_slow, randomised

import jpeft
from jpeft.core import tree
from jpeft.core.errors import UserError
from jpeft.core.partition import split
from jpeft.data import tokenizer as tokenizers
from jpeft.models import Bert, pretrained
from jpeft.plans.plan import Entry
from jpeft.serving import multi_task
from jpeft.store import model_folder
from jpeft.transforms.registry import METHODS

PAIRS = [("the dog runs", "the cat sleeps"), ("a tree", "a house"), ("the dog", "the cat sees a big tree")]
PLAN = {0: [Entry("prefix", {"mlp_hidden": 8})], 1: [Entry("pfeiffer", {"bottleneck": 4}), Entry("lora", {"rank": 3})]}
SMALL = {
    "adamix": {"bottleneck": 4, "experts": 2},
    **{name: {"ratio": 0.1} for name in ("fish", "magnitude_mask", "random_mask")},
    "ladder_side": {"reduction_factor": 4},
    "mam": {"mlp_hidden": 8},
    "prefix": {"num_virtual_tokens": 3, "mlp_hidden": 8},
    "sparse_adapter": {"bottleneck": 4},
    "top_k_layers": {"num_layers": 1},
    "unipelt": {"mlp_hidden": 8},
}
REWRITES, LENGTHENS = "rewrites weights of the base in the forward pass", "changes the length of rows"
REFUSED = {
    "full": "full trains all weights of the base",
    "dora": "dora computes with weights of the base in the forward pass",
    **{name: f"{name} {LENGTHENS}" for name in ("p_tuning", "prompt")},
    **{name: f"{name} {REWRITES}" for name in ("fish", "magnitude_mask", "random_mask", "said", "top_k_layers")},
}
MIXED = [name for name in METHODS if name not in REFUSED]


@pytest.fixture(scope="module")
def make(tiny_model):
    """Makes random modules on one base, as `jpeft.load` returns them."""
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(7))
    base = randomised(loaded.params)
    tokenizer = tokenizers.load(tiny_model, loaded.config.vocab_size)
    ids = jax.ShapeDtypeStruct((1, 5), "int32")

    @functools.cache
    def widened(num_labels):
        model = Bert(dataclasses.replace(loaded.config, num_labels=num_labels))
        return model, jpeft.sites(model, ids, ids, ids)

    def saved(method, seed=1, labels=("no", "yes"), num_texts=2, max_length=16, spread=0.1, **options):
        if isinstance(method, str):
            made = METHODS[method].make
            if made and "layers" in inspect.signature(made).parameters and method != "top_k_layers":
                options = {"layers": [seed % 2], **options}  # half as much to compile
            options = {**SMALL.get(method, {}), **options}
            method = jpeft.build(PLAN) if method == "fishpal" else made(**options) if made else jpeft.chain()
        method = jpeft.chain(method)
        model, sites = widened(len(labels) or 1)
        trained, fixed = split(jpeft.init(method, jax.random.key(seed), sites, base))
        moved = jax.tree.map(lambda x, y: x + y, trained, randomised(trained, seed=seed, scale=spread))
        leaves = jpeft.fold(method, tree.union(fixed, moved))
        rng = np.random.default_rng(seed)
        head = {"kernel": rng.normal(size=(16, len(labels) or 1)), "bias": rng.normal(size=len(labels) or 1)}
        params = {**base, "classifier": jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), head)}
        return jpeft.Saved(
            model, method, {"params": params, "peft": leaves}, labels, "mrpc", max_length, tokenizer, num_texts,
            tiny_model, {"fingerprint": "of the base"},
        )  # fmt: skip

    return saved


def check(many, savings, tasks, texts):
    """The answers are those of one task at a time."""
    answers = many.predict(tasks, texts)
    for name, saved in savings.items():
        rows = [i for i, task in enumerate(tasks) if task == name]
        if rows:
            expected = jpeft.predict(saved, [texts[i] for i in rows])
            np.testing.assert_allclose(np.stack([answers[i] for i in rows]), expected, rtol=0, atol=1e-5)
    return answers


@pytest.fixture(scope="module")
def everything(make):
    """One batch with rows of all methods that can be mixed: {method: (what is saved, logits of its rows)}."""
    all_saved = {name: make(name, seed=i) for i, name in enumerate(MIXED)}
    many = jpeft.MultiTask(all_saved)
    assert many.tasks == tuple(MIXED)
    multi_task._answer.clear_cache()
    answers = many.predict([name for name in MIXED for _ in (0, 1)], [*PAIRS[:2]] * len(MIXED))
    assert multi_task._answer._cache_size() <= 2  # one program for each padded length
    return {name: (all_saved[name], np.stack(answers[2 * i : 2 * i + 2])) for i, name in enumerate(MIXED)}


# Like one of the others in how they are mixed.
ALIKE = ("houlsby", "parallel", "sparse_adapter", "adapterdrop", "rslora", "pissa", "krona", "layer_norm", "bitfit")


@pytest.mark.parametrize("order", [("plain", "low", "high"), ("high", "low", "plain")], ids=["plain", "dropping"])
def test_adapters_are_dropped_from_the_layers_of_their_own_task(make, order):
    """In the layers that it keeps, AdapterDrop does what plain adapters do."""
    every = {
        "plain": make("pfeiffer", seed=1, layers=None),
        "low": make("adapterdrop", seed=2, layers=None, drop=0),
        "high": make("adapterdrop", seed=3, layers=None, drop=1),
    }
    savings = {name: every[name] for name in order}
    check(jpeft.MultiTask(savings), savings, [*order, *order], [*PAIRS[:3], *PAIRS[:3]])


@pytest.mark.parametrize("name", all_but_slow(METHODS, ALIKE))
def test_every_method_is_mixed_or_refused_by_name(make, name, request):
    if name in REFUSED:
        many = jpeft.MultiTask({"other": make("lora")})
        saved = make(name)
        if name == "full":
            saved = saved._replace(identity={"fingerprint": pretrained.fingerprint({})})
        message = f"task 'mine' cannot be mixed with others: {REFUSED[name]}: serve it by itself with jpeft.predict"
        with pytest.raises(UserError, match=re.escape(message)):
            many.add("mine", saved)
        assert many.tasks == ("other",)
        return
    saved, logits = request.getfixturevalue("everything")[name]
    np.testing.assert_allclose(logits, jpeft.predict(saved, PAIRS[:2]), rtol=0, atol=1e-5)
    without = saved._replace(transform=jpeft.chain(), variables={**saved.variables, "peft": {}})
    assert name == "head" or np.abs(logits - jpeft.predict(without, PAIRS[:2])).max() > 1e-3


TEXTS = [
    *PAIRS,
    ("a big red house", "the old cat sees a tree and the old cat sees a dog and a tree"),
    *("the dog runs", "a big tree", "the old house the old house the old house"),
]


@pytest.fixture(scope="module")
def several(make):
    """Tasks with modules of different ranks, labels, lengths and kinds of texts."""
    return {
        "small": make("lora", rank=2),
        "cut": make("lora", seed=2, rank=4, targets="query|key|ffn/output", max_length=9),
        "roots": make("rslora", seed=3, rank=3, labels=("a", "b", "c"), alpha_pattern={"query": 5.0}),
        "principal": make("pissa", seed=4, rank=2, num_texts=1),
        "value": make("head", seed=5, labels=(), num_texts=1, max_length=5),
        "plan": make("fishpal", seed=6),
    }


def test_ranks_labels_lengths_and_kinds_of_texts_differ(several):
    many = jpeft.MultiTask(several)
    tasks = ["small", "plan", "roots", "cut", "principal", "value", "value"]
    answers = check(many, several, tasks, TEXTS)
    assert [answer.shape for answer in answers] == [(2,), (2,), (3,), (2,), (2,), (1,), (1,)]
    assert {answer.dtype for answer in answers} == {np.dtype("float32")}
    order = [3, 0, 6, 2, 5, 1, 4]
    again = many.predict(np.array(tasks)[order], [TEXTS[i] for i in order])
    for i, answer in zip(order, again, strict=True):
        np.testing.assert_allclose(answer, answers[i], rtol=0, atol=1e-5)
    assert many.predict([], []) == []


def test_tasks_come_and_go_without_compiling(make, monkeypatch):
    counted = chex.assert_max_traces(multi_task._answer.__wrapped__, n=1)
    monkeypatch.setattr(multi_task, "_answer", jax.jit(counted, static_argnums=(0, 1)))
    shapes = {"a": {"rank": 4}, "b": {"rank": 2}, "c": {"rank": 4}, "d": {"rank": 3}, "e": {"rank": 1}}
    saved = {name: make("lora", seed=2 * i, **options) for i, (name, options) in enumerate(shapes.items())}
    many, texts = jpeft.MultiTask({name: saved[name] for name in "abc"}), [PAIRS[0]] * 3
    check(many, saved, ["a", "b", "c"], texts)
    many.add("d", saved["d"])
    check(many, saved, ["d", "b", "a"], texts)
    many.remove("a")  # the greatest rank stays that of the stacks
    many.remove("c")
    check(many, saved, ["d", "b", "d"], texts)
    many.add("e", saved["e"])
    many.add("b", saved["a"])  # replaces
    check(many, {"e": saved["e"], "d": saved["d"], "b": saved["a"]}, ["e", "b", "d"], texts)
    assert many.tasks == ("b", "d", "e")
    for name in "fg":
        many.add(name, saved["c"])
    with pytest.raises(AssertionError, match="traced"):  # five tasks: the next power of two
        many.predict(["g"] * 3, texts)


def test_modules_at_one_site_act_in_the_order_of_their_task(make):
    lora, ia3 = jpeft.lora(rank=2, targets="key"), jpeft.ia3(targets="key")
    saved = {
        "first": make(jpeft.chain(lora, ia3), spread=0.5),
        "last": make(jpeft.chain(ia3, lora), seed=2, spread=0.5),
        "twice": make(jpeft.chain(lora, jpeft.rslora(rank=3, targets="key|value")), seed=3),
        "alone": make(ia3, seed=4),
    }
    many = jpeft.MultiTask(saved)
    check(many, saved, list(saved), [PAIRS[0]] * 4)
    # What is the same program lies in one level: LoRA, (IA)3, LoRA.
    assert {site: len(kinds) for site, kinds in many._levels.items()} == {
        **{f"encoder/layer_{i}/attention/key": 3 for i in (0, 1)},
        **{f"encoder/layer_{i}/attention/value": 1 for i in (0, 1)},
    }


@pytest.mark.slow
def test_adapters_are_of_one_kind_if_they_compute_the_same(make):
    options = [{}, {"scale": 2.0}, {"activation": "gelu"}, {"gate": True}, {"layers": [1, 0]}]
    saved = {str(i): make("pfeiffer", seed=2 * i, bottleneck=4, **each) for i, each in enumerate(options)}
    many = jpeft.MultiTask(saved)
    assert len({kind for _, kind in many._wraps}) == 4
    check(many, saved, list(saved), [PAIRS[0]] * 5)


def test_a_trained_pooler_is_the_task_s_own(make):
    first, second, third = make("lora"), make("lora", seed=2), make("bitfit", seed=3)
    params = tree.replace(first.variables["params"], "pooler", randomised)
    trained = first._replace(variables={**first.variables, "params": params}, identity={"fingerprint": "less"})
    for saved in ({"a": trained, "b": second, "c": third}, {"c": third, "b": second, "a": trained}):
        check(jpeft.MultiTask(saved), saved, ["c", "b", "a", "b"], [PAIRS[0]] * 4)


def test_a_low_rank_update_of_the_head_fits_the_widest_head(make):
    method = jpeft.lora(rank=2, targets="classifier|query")
    saved = {"two": make(method), "three": make(method, seed=2, labels=("a", "b", "c"))}
    check(jpeft.MultiTask(saved), saved, ["two", "three"], PAIRS[:2])
    with pytest.raises(UserError, match="task 'x' cannot be mixed with others: ia3 acts on the head"):
        jpeft.MultiTask({"x": make(jpeft.ia3(targets="classifier"))})


def test_a_head_of_two_layers(make):
    saved = {name: make("lora", seed=i, labels=labels) for i, (name, labels) in enumerate([("a", "xyz"), ("b", "no")])}
    for i, (name, each) in enumerate(saved.items()):
        model = Bert(dataclasses.replace(each.model.config, model_type="roberta"))
        params = {k: v for k, v in each.variables["params"].items() if k != "pooler"}
        head = {"dense": {"kernel": np.zeros((16, 16)), "bias": np.zeros(16)}, "out_proj": params["classifier"]}
        variables = {**each.variables, "params": {**params, "classifier": randomised(head, seed=i)}}
        saved[name] = each._replace(model=model, variables=variables, labels=tuple(each.labels))
    check(jpeft.MultiTask(saved), saved, ["b", "a"], PAIRS[:2])


def test_another_base_is_refused(make):
    first, second = make("lora"), make("lora", seed=2)
    params = tree.replace(first.variables["params"], "embeddings/word_embeddings/embedding", lambda x: x + 1e-3)
    config = dataclasses.replace(first.model.config, layer_norm_eps=1e-3)
    others = [
        first._replace(variables={**first.variables, "params": params}),
        first._replace(model=Bert(config)),
        first._replace(identity={**first.identity, "tokenizer": "another"}),
    ]
    many = jpeft.MultiTask({"a": second})
    for other in others:
        with pytest.raises(UserError, match="task 'b' has another base than the tasks before it: serve it by itself"):
            many.add("b", other)
    # Equal arrays are the same base, wherever they lie.
    copied = first._replace(variables=jax.tree.map(np.array, first.variables))
    many.add("b", copied)
    check(many, {"a": second, "b": copied}, ["b", "a"], PAIRS[:2])


def test_loaded_from_folders(make, tiny_model, tmp_path):
    loaded = pretrained.load(tiny_model, num_labels=2, key=jax.random.key(7))
    _, frozen = tree.split(loaded.params, lambda path: path[0] == "classifier")
    for seed in (1, 2):
        made = make(jpeft.lora(rank=2 * seed), seed=seed)
        model_folder.save(
            tmp_path / str(seed), {"params": {"classifier": made.variables["params"]["classifier"]},
            "peft": made.variables["peft"]}, [{"method": "lora", "options": {"rank": 2 * seed}}],
            base=loaded.source, fingerprint=pretrained.fingerprint(frozen), identity=pretrained.identity(loaded),
            task="mrpc", labels=("no", "yes"), kind="classification", max_length=16, num_texts=2,
        )  # fmt: skip
    first = jpeft.load(tmp_path / "1")
    for second in (jpeft.load(tmp_path / "2", base=first), jpeft.load(tmp_path / "2")):
        saved = {"first": first, "second": second}
        check(jpeft.MultiTask(saved), saved, ["first", "second"], PAIRS[:2])


@pytest.mark.parametrize(
    ("tasks", "texts", "message"),
    [
        (["pair", "pear"], PAIRS[:2], "there is no task 'pear': did you mean 'pair'"),
        (["pair"], PAIRS[:2], "expected a list with the task of each of the 2 texts"),
        ("pair", PAIRS[:2], "expected a list with the task of each of the 2 texts, got 'pair'"),
        (None, PAIRS[:2], "expected a list with the task of each"),
        (["one"], "the dog", "got one string"),
        (["one", "pair"], ["the dog", "the cat"], "text 1: expected a pair of sentences, .* got 'the cat'"),
        (["one", "pair", "one"], ["the dog", PAIRS[0], PAIRS[1]], "text 2: expected a sentence"),
    ],
)
def test_what_cannot_be_answered(make, tasks, texts, message):
    many = jpeft.MultiTask({"pair": make("head"), "one": make("head", num_texts=1)})
    with pytest.raises(UserError, match=message):
        many.predict(tasks, texts)


def test_what_is_no_task(make):
    many = jpeft.MultiTask()
    for name, saved, message in (("a", None, "task 'a': expected what jpeft"), (1, make("head"), "must be a string")):
        with pytest.raises(UserError, match=message):
            many.add(name, saved)
    with pytest.raises(UserError, match="there is no task 'a'"):
        many.remove("a")
    with pytest.raises(UserError, match=r"expected \{name: what"):
        jpeft.MultiTask([make("head")])
    assert many.tasks == ()
