import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpeft.core.errors import UserError
from jpeft.models import hf_config
from jpeft.models.bert import BertConfig

SMALL = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
SHAPES = {
    "embeddings.word_embeddings.weight": (50, 16),
    "embeddings.position_embeddings.weight": (32, 16),
    "embeddings.token_type_embeddings.weight": (2, 16),
    "encoder.layer.0.intermediate.dense.weight": (24, 16),
    "encoder.layer.1.intermediate.dense.weight": (24, 16),
}


def read(folder, text):
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return hf_config.read(folder, 2, {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": -16}, "hidden_size must be at least 1"),
        ({"vocab_size": "50"}, "vocab_size must be an integer, got '50'"),
        ({"hidden_size": True}, "hidden_size must be an integer, got True"),
        ({"hidden_act": []}, "hidden_act must be a string"),
        ({"model_type": ["bert"]}, "is not supported"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a finite number"),
        ({"hidden_dropout_prob": 2}, "hidden_dropout_prob must be at least 0 and below 1"),
        ({"classifier_dropout": -0.1}, "classifier_dropout must be at least 0"),
        ({"initializer_range": 10**400}, "initializer_range must be a finite number"),
        ({"pad_token_id": 50}, "pad_token_id must be from 0"),
        ({"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1}, "leaves no room"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, changes, says):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read(tmp_path, SMALL | changes)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "max_position_embeddings", "num_hidden_layers", "intermediate_size"])
def test_sizes_that_the_weights_do_not_have_are_named_before_anything_is_made(tmp_path, name):
    config = read(tmp_path, SMALL | {name: 10**9})
    with pytest.raises(UserError, match=f"config.json says {name} 1000000000, but the weights have"):
        hf_config.check_sizes(config, SHAPES)
    hf_config.check_sizes(read(tmp_path, SMALL), SHAPES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from([*BertConfig.__dataclass_fields__, "is_decoder", "position_embedding_type"]), value=JSON)
def test_any_value_gives_a_config_or_one_line(tmp_path_factory, name, value):
    try:
        config = read(tmp_path_factory.getbasetemp(), SMALL | {name: value})
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert config.hidden_size % config.num_attention_heads == 0
        assert 0 <= config.hidden_dropout_prob < 1
