"""Words with tags, and rows with any number of classes, from the file to the exported model."""

import json
import random

import jax
import numpy as np
import pytest
from conftest import WORDS

import jpeft
from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data.kinds import IGNORED
from jpeft.run import experiment
from jpeft.run.console import Console
from jpeft.serving import export, stream
from jpeft.workbench import compare, findings

QUIET = Console(quiet=True)
TAGS, TOPICS = ("B-ANIMAL", "O"), ("dog", "red", "runs")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A file of each kind: animals are tagged; a row has the classes of the words in it."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(0)
    rows = [[rng.choice(WORDS) for _ in range(rng.randint(2, 6))] for _ in range(48)]
    tagged = [{"words": row, "tags": ["B-ANIMAL" if word in ("dog", "cat") else "O" for word in row]} for row in rows]
    sets = [{"text": " ".join(row), "topics": [word for word in TOPICS if word in row]} for row in rows]
    for name, found in (("tagging", tagged), ("multilabel", sets)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture
def config_of(tiny_config, sources):
    def make(kind, method="lora", **train):
        config = tiny_config(method, "custom", **{"num_epochs": 2, "max_length": 8, "learning_rate": 3e-2, **train})
        config.data.path = None
        text, label = ("words", "tags") if kind == "tagging" else ("text", "topics")
        file = str(sources / f"{kind}.jsonl")
        config.data.update(train=file, validation=file, text=(text,), label=label, kind=kind)
        return config

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(params=["tagging", "multilabel"])
def trained(request, runs, config_of):
    """The kind, and the workdir of a finished run."""
    workdir = runs / request.param
    if not (workdir / "report.json").is_file():
        experiment.run(config_of(request.param, num_epochs=24), workdir, QUIET)
    return request.param, workdir


def rows_of(sources, kind):
    return [json.loads(line) for line in (sources / f"{kind}.jsonl").read_text().splitlines()]


def test_a_run_learns_what_its_report_says(trained):
    kind, workdir = trained
    report = json.loads((workdir / "report.json").read_text())
    metric = "entity_f1" if kind == "tagging" else "micro_f1"
    assert report["primary_metric"] == metric
    assert report["metrics"]["mean"][metric] > 0.5
    assert report["baseline"]["metrics"][metric] < 0.1
    assert report["baseline"]["answer"] in (workdir / "report.md").read_text()


def test_a_model_that_was_saved_answers_as_in_the_run(trained, sources):
    kind, workdir = trained
    saved = jpeft.load(workdir / "seed_11" / "model")
    assert saved.kind == kind
    stored = files.read_leaves(workdir / "seed_11" / experiment.PREDICTIONS)
    rows = rows_of(sources, kind)
    texts = [row["words"] if kind == "tagging" else row["text"] for row in rows]
    found = jpeft.predict(saved, texts)
    if kind == "tagging":
        assert [len(own) for own in found] == [len(words) for words in texts]
        # The run cut its rows to eight tokens, six words; prediction does not.
        found = np.concatenate(found)
        assert np.sum(stored["labels"] != IGNORED) == len(found)
    np.testing.assert_allclose(found, stored["logits"], atol=1e-5)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_answers_for_files(trained, sources, tmp_path, ending):
    kind, workdir = trained
    rows, output = rows_of(sources, kind), tmp_path / f"out.{ending}"
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:5], {"x": 1}, *rows[5:]]))
    counts = stream.predict(workdir, str(source), output, QUIET)
    assert counts == (48, 1)
    lines = output.read_text().splitlines()
    stored = files.read_leaves(workdir / "seed_11" / experiment.PREDICTIONS)
    logits = np.asarray(stored["logits"])
    if kind == "tagging":
        words = np.cumsum([len(row["words"]) for row in rows])[:-1]
        wanted = [[TAGS[i] for i in own] for own in np.split(logits.argmax(1), words)]
    else:
        wanted = [[name for name, x in zip(TOPICS, own, strict=True) if x > 0] for own in logits]
    if ending == "csv":
        head, *lines = lines
        assert head == ("row,tags" if kind == "tagging" else "row,labels,dog,red,runs")
        mark = " " if kind == "tagging" else ";"
        found = [answer.split(mark) if answer else [] for answer in (line.split(",")[1] for line in lines)]
    else:
        found = [json.loads(line)["tags" if kind == "tagging" else "labels"] for line in lines]
        assert [json.loads(line)["row"] for line in lines] == [i for i in range(1, 50) if i != 6]
    assert found == wanted


def test_sentences_longer_than_the_model_go_to_the_side_file(trained, tmp_path):
    kind, workdir = trained
    if kind != "tagging":
        pytest.skip("only words all want an answer")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"words": ["dog"] * n}) + "\n" for n in (30, 31, 3)))  # of 32 tokens
    assert stream.predict(workdir, str(source), output, QUIET) == (2, 1)
    assert [len(json.loads(line)["tags"]) for line in output.read_text().splitlines()] == [30, 3]
    (error,) = (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()
    assert json.loads(error) == {
        "row": 2,
        "error": "31 words are more than 32 tokens, the most that this model answers",
    }
    with pytest.raises(UserError, match="text 1: 31 words are more than 32 tokens"):
        jpeft.predict(jpeft.load(workdir / "seed_11" / "model"), [["dog"], ["dog"] * 31])


@pytest.mark.parametrize("form", ["hf", "peft", "adapters"])
def test_exports_have_the_answers_of_the_run(trained, tmp_path, form):
    kind, workdir = trained
    if (kind, form) == ("multilabel", "peft"):
        pytest.skip("as for one class")
    if (kind, form) == ("tagging", "adapters"):
        with pytest.raises(UserError, match="heads for words are not written for adapters: export another format"):
            export.export(workdir, form, tmp_path / "out", QUIET)
        return
    (drift, *_) = export.export(workdir, form, tmp_path / "out", QUIET)
    assert drift.largest < 1e-4
    assert drift.changed == 0
    if form == "hf":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        what = "Token" if kind == "tagging" else "Sequence"
        assert config["architectures"] == [f"BertFor{what}Classification"]
        assert config.get("problem_type") == (None if kind == "tagging" else "multi_label_classification")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{'token' if kind == 'tagging' else 'text'}-classification" in card


@pytest.mark.slow  # criteria do not know of words
def test_fishpal_chooses_for_words(config_of, tmp_path):
    config = config_of("tagging", "fishpal", num_epochs=1)
    config.fishpal.update(criterion="shuffled_labels", num_examples=24)
    experiment.run(config, tmp_path, QUIET)
    assert sorted(json.loads((tmp_path / "seed_11" / "plan.json").read_text())) == ["0", "1"]


@pytest.mark.slow
def test_penalties_and_prompts_take_words(config_of, tmp_path):
    for method in ("adamix", "prompt"):
        config = config_of("tagging", method, num_epochs=1)
        experiment.run(config, tmp_path / method, QUIET)


def test_a_set_of_classes_is_no_distribution(config_of, tmp_path):
    with pytest.raises(UserError, match="adamix's penalty needs one class a row"):
        experiment.run(config_of("multilabel", "adamix"), tmp_path, QUIET)


@pytest.mark.slow  # the loop does not know of words
def test_seeds_train_together_as_alone(config_of, tmp_path):
    config = config_of("tagging")
    config.seeds = (1, 2)
    experiment.run(config, tmp_path / "alone", QUIET)
    config.train.together = 2
    experiment.run(config, tmp_path / "both", QUIET)
    for seed in config.seeds:
        alone, both = (
            files.read_leaves(tmp_path / name / f"seed_{seed}" / experiment.PREDICTIONS)["logits"]
            for name in ("alone", "both")
        )
        np.testing.assert_allclose(alone, both, atol=1e-4)


def test_words_beyond_the_greatest_length_are_counted(config_of, tmp_path):
    config, console = config_of("tagging", num_epochs=1), Console(quiet=True)
    config.data.train = str(tmp_path / "long.conll")
    (tmp_path / "long.conll").write_text(("dog B-ANIMAL\n" * 8 + "\nthe O\n\n") * 5)
    experiment.run(config, tmp_path / "run", console)
    assert any(text.startswith("10 of 45 words of train are beyond") for text in console.warnings)


def test_a_head_for_words_answers_at_their_tokens(trained):
    kind, workdir = trained
    saved = jpeft.load(workdir / "seed_11" / "model")
    ids = jax.numpy.array([[2, 4, 6, 3]])
    logits, _ = jpeft.apply(saved.model, saved.transform, saved.variables, ids)
    assert logits.shape == ((1, 4, 2) if kind == "tagging" else (1, 3))


def test_words_come_as_lists(trained):
    kind, workdir = trained
    saved = jpeft.load(workdir / "seed_11" / "model")
    if kind == "tagging":
        with pytest.raises(UserError, match="text 0: expected a list of words, as in training, got 'the dog'"):
            jpeft.predict(saved, ["the dog"])
        with pytest.raises(UserError, match="task 'ner' has a head for words"):
            jpeft.MultiTask({"ner": saved})
        with pytest.raises(UserError, match=r"text 1: expected a list of words, as in training, got \['the', ' '\]"):
            jpeft.predict(saved, [["dog"], ["the", " "]])
    else:
        with pytest.raises(UserError, match="text 0: expected a sentence, as in training"):
            jpeft.predict(saved, [["the", "dog"]])


@pytest.mark.usefixtures("programs_stay")
def test_cells_of_comparisons_keep_all_answers(config_of, tmp_path, trained):
    kind, _ = trained
    own = config_of(kind, num_epochs=1)
    grid = compare.default({"head": {"method": "head"}}, ("custom",), (1,))
    grid.run.model = own.model
    grid.run.data.update({name: value for name, value in own.data.to_dict().items() if value is not None})
    grid.run.train.update(num_epochs=1, max_length=8, learning_rate=0.1)
    list(compare.run_all(grid, tmp_path / "cells", tmp_path / "runs", QUIET))
    (outcome,) = findings.outcomes(grid, tmp_path / "cells")
    written = json.loads((tmp_path / "cells" / "custom-head-1.json").read_text())
    assert outcome.score() == pytest.approx(written["metrics"][outcome.task.primary])
    rows = np.arange(len(outcome.labels))[::-1]  # a draw of the bootstrap has the rows in any order
    assert outcome.score(rows) == pytest.approx(outcome.score())


def test_texts_and_virtual_tokens_have_to_fit_together(config_of, tmp_path):
    config = config_of("tagging", "prompt", num_epochs=1, max_length=32)  # the model takes 32
    with pytest.raises(UserError, match=r"config.train.max_length 32 is too long: input of \d+ tokens"):
        experiment.run(config, tmp_path / "long", QUIET)
    config = config_of("tagging", "prompt", num_epochs=1, max_length=12)
    config.peft.prompt.num_virtual_tokens = 20
    experiment.run(config, tmp_path / "fits", QUIET)
    saved = jpeft.load(tmp_path / "fits/seed_11/model")
    assert [len(found) for found in jpeft.predict(saved, [["dog"] * 10, ["dog"]])] == [10, 1]
    with pytest.raises(UserError, match="text 0: 11 words are more than 12 tokens"):
        jpeft.predict(saved, [["dog"] * 11])


def test_labels_of_the_model_are_for_one_answer_a_row(config_of, tmp_path):
    config = config_of("multilabel", "fish", num_epochs=1)
    config.peft.fish.update(ratio=0.1, labels="expected")
    with pytest.raises(UserError, match="labels 'expected' are for one answer a row, not for multilabel"):
        experiment.run(config, tmp_path, QUIET)
