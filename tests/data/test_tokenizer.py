import json
import shutil

import pytest

from jpeft.core.errors import UserError
from jpeft.data import tokenizer


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_words_have_their_own_ids(folder):
    assert tokenizer.load(folder, 18)("the dog")["input_ids"] == [2, 4, 6, 3]


def test_a_folder_without_a_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model: expected the base model's tokenizer\.json or vocabulary"):
        tokenizer.load(folder, 18)


def test_a_vocabulary_that_is_not_one(folder):
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"cannot read the tokenizer in .*model: expected") as caught:
        tokenizer.load(folder, 18)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacks", ["[SEP]", "[CLS]", "[PAD]"])
def test_a_vocabulary_without_a_special_token(tmp_path, lacks):
    """transformers would add it at the end, and every id behind it would shift."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in words if word != lacks))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=rf"lacks '\{lacks[:-1]}\]' in its vocabulary"):
        tokenizer.load(tmp_path, 18)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert tokenizer.load(tmp_path, 18)("the dog")["input_ids"] == [2, 5, 6, 3]


def test_ids_beyond_the_embedding(folder):
    with pytest.raises(UserError, match=r"has ids up to 17, the model's embedding 17 rows"):
        tokenizer.load(folder, 17)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_transformers_makes_an_empty_tokenizer_of_a_config_alone(folder, kind):
    """The trap: without any file of a vocabulary it does not fail, and every word is unknown."""
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(UserError, match=r"holds no vocabulary: expected (merges\.txt or )?tokenizer\.json or vocab"):
        tokenizer.load(folder, 30522)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({}, "cannot read"),
        ({"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "a": 4}, "cannot read"),
        ({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, "knows no words"),
    ],
)
def test_a_vocabulary_without_words(folder, words, says):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = words
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        tokenizer.load(folder, 18)
