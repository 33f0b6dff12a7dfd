import json

import pyarrow
import pytest
from pyarrow import parquet

from jpeft import UserError
from jpeft.data.custom import custom

ROWS = [("a dog", "a cat", "yes"), ("the tree", "", "no"), ("big", "small", "maybe")] * 4


def write(path, rows=ROWS, names=("one", "two", "answer")):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(separator.join(map(str, row)) for row in (names, *rows)) + "\n")
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_pairs_with_class_names_from_the_data(tmp_path, ending):
    task = custom(write(tmp_path / f"train.{ending}"), ("one", "two"), "answer")
    assert (task.labels, task.num_labels, task.metrics) == (("maybe", "no", "yes"), 3, ("accuracy", "macro_f1"))
    splits = task.splits()
    train, held = splits.splits["train"], splits.splits["validation"]
    assert (len(train["label"]), len(held["label"])) == (11, 1)
    for split in (train, held):
        for one, label in zip(split["one"], split["label"], strict=True):
            assert {"a dog": 2, "the tree": 1, "big": 0}[one] == label
    assert sum(splits.empty_texts.values()) == 4
    assert task.splits() == splits  # the same rows every time


def test_the_split_depends_on_its_seed_alone(tmp_path):
    file = write(tmp_path / "train.csv", [(f"row {i}", "x", i % 2) for i in range(40)])
    tasks = [custom(file, ("one",), "answer", split_seed=seed) for seed in (0, 1)]
    held = [task.splits().splits["validation"]["one"] for task in tasks]
    assert held[0] != held[1]
    assert len(held[0]) == 4


def test_files_for_validation_and_test_whose_labels_may_be_hidden(tmp_path):
    train, validation = write(tmp_path / "train.csv"), write(tmp_path / "dev.csv", ROWS[:2])
    test = write(tmp_path / "test.csv", [("x", "y")], ("one", "two"))
    task = custom(train, ("one",), "answer", validation=validation, test=test, labels=("yes", "no", "maybe"))
    splits = task.splits().splits
    assert (splits["validation"]["label"], splits["test"]["label"]) == ([0, 1], [-1])
    assert splits["train"]["label"][:3] == [0, 1, 2]


def test_values_are_there_in_all_rows_of_a_split_or_in_none(tmp_path):
    """-1 stands for a label that is not there, and is a value like any other."""
    train = write(tmp_path / "train.csv", [("a", "b", i / 2) for i in range(30)])
    test = tmp_path / "test.jsonl"
    test.write_text('{"one": "a", "answer": 1.5}\n{"one": "b"}\n')
    task = custom(train, ("one",), "answer", test=str(test), kind="regression")
    with pytest.raises(
        UserError, match=r"test\.jsonl: 1 of 2 rows have no 'answer': all of them must have one, or none"
    ):
        task.splits()


def test_numbers_are_classes_in_their_order_and_values_in_a_regression(tmp_path):
    file = write(tmp_path / "train.csv", [("a", "b", i % 11) for i in range(30)])
    assert custom(file, ("one",), "answer").labels == tuple(map(str, range(11)))
    values = write(tmp_path / "values.csv", [("a", "b", i / 2) for i in range(30)])
    task = custom(values, ("one",), "answer", kind="regression")
    assert (task.labels, task.primary) == ((), "pearson")
    splits = task.splits().splits
    assert sorted(splits["train"]["label"] + splits["validation"]["label"])[:3] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "nowhere.csv"}, "config.data.train: there is no file nowhere.csv"),
        ({"text": ("won",)}, "row 1: no column 'won'; did you mean 'two' or 'one'"),
        ({"text": ()}, "config.data.text must name one or two columns"),
        ({"label": "anser"}, "row 1: no column 'anser'; did you mean 'answer'"),
        ({"labels": ("yes", "no")}, "row 3: label 'maybe' is unknown: expected one of 'yes', 'no'"),
        ({"labels": ("yes", "yes")}, "must be at least two distinct names"),
        ({"kind": "regression"}, "row 1: label 'yes' is not a number"),
        ({"validation_fraction": 1.5}, "validation_fraction must be above 0 and below 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, options, message):
    file = write(tmp_path / "train.csv")
    with pytest.raises(UserError, match=message):
        custom(**{"train": file, "text": ("one",), "label": "answer", **options}).splits()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b", "0.5"), ("a", "b", "1.5")], "label 0.5 is not a class: set config.data.kind=regression"),
        ([("a", "b", "x")], "has 1 different labels"),
        ([("a", "b", ""), ("a", "b", "x")], "row 1: the label is empty"),
        ([("a", "b", i) for i in range(1001)], "has 1,001 different labels in column 'answer': is it the right column"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        custom(write(tmp_path / "train.csv", rows), ("one",), "answer")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_blank_lines_at_the_end_mean_nothing_and_others_are_refused(tmp_path, ending):
    path = tmp_path / f"train.{ending}"
    write(path)
    whole = path.read_text()
    path.write_text(whole + "\n\r\n  \n\n")
    splits = custom(str(path), ("one",), "answer").splits().splits
    assert sum(len(split["label"]) for split in splits.values()) == 12
    first, rest = whole.split("\n", 1)
    path.write_text(f"{first}\n\n{rest}")
    with pytest.raises(UserError, match=r"row 2: not JSON|row 1: (0|1) fields where the header has 3"):
        custom(str(path), ("one",), "answer")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_column_that_is_there_twice(tmp_path, ending):
    with pytest.raises(UserError, match="column 'one' occurs twice"):
        custom(write(tmp_path / f"train.{ending}", names=("one", "one", "answer")), ("one",), "answer")


def test_a_name_that_is_there_twice_in_a_row(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"one": "a", "one": "b", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"row 1: .*twice"):
        custom(str(tmp_path / "train.jsonl"), ("one",), "answer")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": ("one", "one")}, "must name distinct columns"),
        ({"text": ("answer",)}, "must name distinct columns"),
        ({"split_seed": -1}, "split_seed must be from 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, changes, says):
    file = write(tmp_path / "train.csv")
    with pytest.raises(UserError, match=says):
        custom(**{"train": file, "text": ("one",), "label": "answer", **changes})


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("neg", "neg "),
        ("neg", "NEG"),
        ("1", "1.0"),
        ("1", "01"),
        ("caf\u00e9", "cafe\u0301"),
    ],
)
def test_labels_that_a_reader_takes_for_one(tmp_path, name, twin):
    path = tmp_path / "train.csv"
    path.write_text(f"text,label\na,{name}\nb,2\nc,{twin}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"differ in case, spaces or spelling only: mend them, or name all classes"):
        custom(str(path), ("text",))
    assert custom(str(path), ("text",), labels=(name, "2", twin)).labels == (name, "2", twin)


def test_large_numbers_are_classes_of_their_own(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,12345678\nb,12345679\n")
    assert custom(str(path), ("text",)).labels == ("12345678", "12345679")


@pytest.mark.parametrize("missing", ["nan", "NaN"])
def test_a_missing_label_is_no_class(tmp_path, missing):
    path = tmp_path / "train.csv"
    path.write_text(f"text,label\na,neg\nb,pos\nc,{missing}\n")
    with pytest.raises(UserError, match=f"the label '{missing}' looks like a missing one"):
        custom(str(path), ("text",))
    assert custom(str(path), ("text",), labels=("neg", "pos", missing)).num_labels == 3


def test_none_is_a_class(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,favor\nb,against\nc,none\n")
    assert custom(str(path), ("text",)).labels == ("against", "favor", "none")


def test_a_truth_among_numbers_is_no_class(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": {label}}}\n' for label in ("0", "1", "true")))
    with pytest.raises(UserError, match="the label 'true' is among numbers"):
        custom(str(path), ("text",))


def test_columns_of_parquet_that_are_there_twice(tmp_path):
    columns = [pyarrow.array(column) for column in (["a", "b"], ["c", "d"], ["x", "y"])]
    parquet.write_table(pyarrow.table(columns, names=["text", "text", "label"]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="column 'text' occurs twice"):
        custom(str(tmp_path / "train.parquet"), ("text",))


def test_lines_that_end_in_a_carriage_return_alone(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"text,label\ra,1\rb,2\r")
    with pytest.raises(UserError, match="a lone carriage return ends a line"):
        custom(str(tmp_path / "train.csv"), ("text",))


def test_a_value_that_is_not_finite_when_squared(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,1\nb,1e30\n")
    with pytest.raises(UserError, match=r"label '1e30' is not a number up to 1e\+18"):
        custom(str(path), ("text",), kind="regression").splits()


def test_true_and_false_are_classes(tmp_path):
    task = custom(write(tmp_path / "train.jsonl", [("a", "b", True), ("c", "d", False)] * 3), ("one",), "answer")
    assert task.labels == ("false", "true")


@pytest.mark.parametrize("label", ["[1]", "{}", "NaN", "Infinity", '"a\\nb"', "9" * 5000, '"' + "x" * 201 + '"'])
def test_a_label_that_is_no_name_is_one_line(tmp_path, label):
    path = tmp_path / "train.jsonl"
    path.write_text('{"one": "a", "answer": "x"}\n{"one": "b", "answer": ' + label + "}\n")
    with pytest.raises(UserError, match=r"train\.jsonl, row 2") as caught:
        custom(str(path), ("one",), "answer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ['{"one": "\\ud800", "answer": "x"}', "[" * 100_000, '{"one": ' + "9" * 5000 + "}"])
def test_text_that_is_none_is_one_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"one": "a", "answer": "x"}\n{"one": "b", "answer": "y"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl, row 3"):
        custom(str(path), ("one",), "answer").splits()


def test_a_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(UserError, match=r"train.txt is of an unknown kind: expected \.jsonl"):
        custom(str(tmp_path / "train.txt"), ("one",))


def many(path, labels, names=("text", "topics")):
    path.write_text("".join(json.dumps({names[0]: "a dog", names[1]: own}) + "\n" for own in labels))
    return str(path)


def test_several_classes_a_row_as_lists_or_between_semicolons(tmp_path):
    listed = many(tmp_path / "a.jsonl", [["red", "big"], [], ["big"], ["old"]])
    table = write(tmp_path / "a.csv", [("x", "red; big"), ("x", ""), ("x", "big"), ("x", "old")], ("text", "topics"))
    for file in (listed, table):
        task = custom(file, ("text",), "topics", kind="multilabel", validation=file)
        assert (task.labels, task.metrics, task.primary) == (
            ("big", "old", "red"), ("micro_f1", "macro_f1", "exact_match"), "micro_f1",
        )  # fmt: skip
        assert task.splits().splits["train"]["label"] == [[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_words_with_tags_from_four_kinds_of_file(tmp_path):
    words, tags = [["the", "big-dog", "runs"], ["a", "cat"]], [["O", "B-ANIMAL", "O"], ["O", "B-ANIMAL"]]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"words": w, "tags": t}) + "\n" for w, t in zip(words, tags, strict=True))
    )
    parquet.write_table(pyarrow.table({"words": words, "tags": tags}), tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("words\ttags\nthe big-dog runs\tO B-ANIMAL O\na cat\tO B-ANIMAL\n")
    (tmp_path / "a.conll").write_text(
        "-DOCSTART- -X- O\n\nthe DET O\nbig-dog NOUN B-ANIMAL\nruns VERB O\n\n\na DET O\ncat NOUN B-ANIMAL\n"
    )
    for ending in ("jsonl", "parquet", "tsv", "conll"):
        file = str(tmp_path / f"a.{ending}")
        task = custom(file, ("words",), "tags", kind="tagging", validation=file)
        assert (task.labels, task.primary) == (("B-ANIMAL", "O"), "entity_f1")
        train = task.splits().splits["train"]
        assert (train["words"], train["label"]) == (words, [[1, 0, 1], [1, 0]])


def test_tags_that_are_no_entities_are_scored_word_by_word(tmp_path):
    (tmp_path / "a.conll").write_text("the DET\ndog NOUN\n\na DET\n")
    task = custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging")
    assert (task.metrics, task.primary) == (("accuracy", "macro_f1"), "accuracy")


@pytest.mark.parametrize(
    ("rows", "kind", "says"),
    [
        (
            [{"words": ["a", "b"], "tags": ["O"]}, {"words": ["a"], "tags": ["X"]}],
            "tagging",
            "row 1: 1 tags for 2 words",
        ),
        ([{"words": [], "tags": ["O", "X"]}], "tagging", "row 1: 'words' has no words"),
        ([{"words": ["a", " "], "tags": ["O", "X"]}], "tagging", "row 1: 'words' holds ' ', which is not a word"),
        ([{"words": ["a", 1], "tags": ["O", "X"]}], "tagging", "row 1: 'words' holds 1, which is not a word"),
        ([{"words": ["a"], "tags": {"x": 1}}], "tagging", "row 1: label {'x': 1} is neither a list of tags nor"),
        ([{"words": ["a"], "tags": [["O"]]}], "tagging", r"row 1: label \['O'\] is neither a name nor a number"),
        ([{"words": ["a"], "tags": []}], "tagging", "row 1: the label is empty"),
        ([{"words": "a b", "tags": 3}], "multilabel", "row 1: label 3 is neither a list of names nor text"),
        ([{"words": "a b", "tags": ["x", "x"]}], "multilabel", r"row 1: label \['x', 'x'\] has a name twice"),
        ([{"words": "a b", "tags": ["x"]}], "multilabel", "has 1 different labels in column 'tags'"),
        ([{"words": "a b", "tags": "['x', 'y']"}], "multilabel", "row 1: label .* is a list written as text: .*';'"),
        ([{"words": "a b", "tags": "[]"}], "multilabel", "row 1: label .* is a list written as text"),
        ([{"words": "a b", "tags": "[1, 0, 1]"}], "multilabel", "row 1: label .* is a list written as text"),
        ([{"words": "a b", "tags": "['O' 'X']"}], "tagging", "row 1: label .* is a list written as text: .* spaces"),
        ([{"words": "['a', 'b']", "tags": "O X"}], "tagging", "row 1: 'words' is .*, a list written as text"),
        ([{"words": "a b", "tags": "x"}], "labelling", "config.data.kind 'labelling' is unknown: expected one of"),
    ],
)
def test_what_words_and_sets_cannot_be(tmp_path, rows, kind, says):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=says):
        custom(str(file), ("words",), "tags", kind=kind, validation=str(file)).splits()


def test_a_conll_file_that_lacks_a_tag(tmp_path):
    (tmp_path / "a.conll").write_text("the DET\ndog NOUN\n\na DET\ncat\n")
    with pytest.raises(UserError, match=r"a\.conll, row 2: 'cat' has no tag"):
        custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging")


def test_lines_of_a_conll_file_with_more_or_fewer_columns(tmp_path):
    """The last column of such a line would be taken for the tag."""
    for line in ("dog NN B-NP", "# a comment"):
        (tmp_path / "a.conll").write_text(f"the DT B-NP O\n\na DT B-NP O\n{line}\n")
        with pytest.raises(UserError, match=r"a\.conll, row 2: .* has \d columns, the first line 4"):
            custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging")


def test_numbers_of_many_digits_are_classes_of_their_own(tmp_path):
    numbers = ["1234567890123456781", "1234567890123456780", "100000000000000000001", "100000000000000000000"]
    file = write(tmp_path / "a.csv", [("x", "y", number) for number in numbers * 2])
    assert custom(file, ("one",), "answer").labels == (numbers[1], numbers[0], numbers[3], numbers[2])


def test_a_label_that_only_looks_like_a_class_is_shown_as_what_it_is(tmp_path):
    train = write(tmp_path / "train.csv", [("x", "y", "\xe9"), ("x", "y", "b")])
    dev = write(tmp_path / "dev.csv", [("x", "y", "e\u0301")])
    with pytest.raises(UserError, match=r"label 'e\\u0301' is unknown: did you mean '\\xe9'\?"):
        custom(train, ("one",), "answer", validation=dev).splits()


@pytest.mark.parametrize("name", ["label", "idx"])
def test_columns_of_text_that_splits_call_their_own(tmp_path, name):
    file = write(tmp_path / "a.csv", [("a", "b", "yes"), ("c", "d", "no")], (name, "two", "answer"))
    with pytest.raises(UserError, match=f"config.data.text names '{name}', which is no name for a column with text"):
        custom(file, (name,), "answer")


def test_a_label_of_spaces_is_no_class(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,label\nx,a\ny, \nz,b\n")
    with pytest.raises(UserError, match=r"a\.csv, row 2: label ' ' cannot be the name of a class"):
        custom(str(file), ("text",))


def test_spaces_inside_of_words_stay(tmp_path):
    (tmp_path / "a.conll").write_text("10\u00a0000 B-N\n\u3000 O\n", encoding="utf-8")
    task = custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging", validation=str(tmp_path / "a.conll"))
    with pytest.raises(UserError, match="holds '\\\\u3000', which is not a word"):
        task.splits()
    (tmp_path / "a.conll").write_text("10\u00a0000 B-N\nx O\n", encoding="utf-8")
    assert task.splits().splits["train"]["words"] == [["10\u00a0000", "x"]]


def test_a_test_split_without_any_class_has_no_labels(tmp_path):
    train = write(tmp_path / "train.csv", [("x", "a;b"), ("y", ""), ("z", "b")], ("text", "topics"))
    test = write(tmp_path / "test.csv", [("x", ""), ("y", "")], ("text", "topics"))
    task = custom(train, ("text",), "topics", kind="multilabel", validation=train, test=test)
    assert task.splits().splits["test"]["label"] == [-1, -1]


def test_names_that_answers_could_not_tell_apart(tmp_path):
    for kind, label in (("multilabel", ["a;b"]), ("tagging", ["a b"])):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "label": label}) + "\n")
        with pytest.raises(UserError, match=r"row 1: label 'a.b' cannot be the name of a class"):
            custom(str(tmp_path / "a.jsonl"), ("text",), kind=kind)


def test_a_conll_file_whose_first_column_counts(tmp_path):
    (tmp_path / "a.conll").write_text("1 the DT O\n2 dog NN B-X\n3 runs VB O\n")
    with pytest.raises(UserError, match="row 1: the first column counts the words"):
        custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging")
    (tmp_path / "a.conll").write_text("1 CD O\n2 CD B-X\n4 CD O\n")
    custom(str(tmp_path / "a.conll"), ("words",), "tags", kind="tagging")


def test_a_header_that_is_there_again(tmp_path):
    """As in files that were put one behind the other."""
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,x\nb,y\ntext,label\nc,x\n")
    with pytest.raises(UserError, match=r"a\.csv, row 3: the header again"):
        custom(str(file), ("text",))


@pytest.mark.parametrize(("ending", "other"), [("csv", ";"), ("csv", "\t"), ("tsv", ",")])
def test_columns_between_other_signs(tmp_path, ending, other):
    file = tmp_path / f"a.{ending}"
    file.write_text(f"text{other}label\na{other}x\nb{other}y\n")
    with pytest.raises(UserError, match=r"the header is one column with .* in it: columns are separated by"):
        custom(str(file), ("text",))
