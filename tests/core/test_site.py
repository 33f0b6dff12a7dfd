"""The sites of models that never heard of jpeft, and of an encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import SITES, D, X

import jpeft
from jpeft.core.errors import UserError
from jpeft.core.site import find, layer_of, matches, within_layer
from jpeft.models import Bert, BertConfig


def test_sites_of_a_users_model():
    paths = ["blocks_0", "blocks_0/proj", "blocks_1", "blocks_1/proj", "Dropout_0", "out"]
    assert sorted(SITES) == sorted(paths)
    assert [site.path for site in SITES.values()] == list(SITES) == paths
    proj = SITES["blocks_1/proj"]
    assert (proj.layer, proj.kind) == (1, "Dense")
    assert proj.params["kernel"].shape == (D, D)
    assert proj.args[0] == jax.ShapeDtypeStruct((4, D), jnp.float32)
    assert SITES["out"].layer is None
    assert SITES["out"].params["kernel"].shape == (D, 3)
    assert jpeft.layers(SITES) == (0, 1)


def test_sites_of_an_encoder():
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=8,
    )  # fmt: skip
    found = jpeft.sites(Bert(config), jax.ShapeDtypeStruct((3, 6), jnp.int32))
    per_layer = ["", "/attention", "/ffn", "/attention_add_norm", "/ffn_add_norm", "/attention/core", "/ffn/output"]
    per_layer += [f"/attention/{name}" for name in ("query", "key", "value", "output")] + ["/ffn/intermediate"]
    per_layer += ["/attention_add_norm/LayerNorm", "/ffn_add_norm/LayerNorm"]
    wanted = {f"encoder/layer_{i}{end}" for i in (0, 1) for end in per_layer}
    wanted |= {"embeddings", "embeddings/inputs", "embeddings/LayerNorm", "encoder", "pooler", "classifier"}
    wanted |= {f"embeddings/{name}_embeddings" for name in ("word", "position", "token_type")}
    assert {path for path in found if "Dropout" not in path} == wanted
    core = found["encoder/layer_1/attention/core"]
    assert core.layer == 1
    assert core.params == {}
    assert [x.shape for x in core.args] == [(3, 6, 16), *[(3, 4, 6, 4)] * 3, (3, 1, 6, 6)]
    assert found["encoder/layer_0/ffn/intermediate"].params["kernel"].shape == (16, 24)


def test_sites_computes_and_allocates_nothing():
    model = nn.Sequential([nn.Dense(10**7), nn.Dense(10**7)])  # 400 TB
    found = jpeft.sites(model, jax.ShapeDtypeStruct((1, 10**7), jnp.float32))
    assert found["layers_1"].params["kernel"].shape == (10**7, 10**7)
    assert all(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(next(tuple(s) for s in found.values())[3:6])
    )


def test_sites_takes_flags_and_lists_a_module_called_twice_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, flag, *, train):
            assert flag is True
            assert train is False
            proj = nn.Dense(D, name="proj")
            return proj(proj(x)[:2])

    found = jpeft.sites(Twice(), X, True, train=False)
    assert list(found) == ["proj"]
    assert found["proj"].args[0].shape == (4, D)


@pytest.mark.parametrize(
    ("path", "layer"),
    [("encoder/layer_11/attention", 11), ("h_3", 3), ("a/blocks_2/b", 2), ("layers_0", 0), ("block_4/x", 4),
     ("pooler", None), ("xlayer_3", None), ("layer_3x", None), ("Dense_1", None)],
)  # fmt: skip
def test_layer_of(path, layer):
    assert layer_of(path) == layer


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "layers", "paths"),
    [
        ("proj", None, ["blocks_0/proj", "blocks_1/proj"]),
        ("proj", [1], ["blocks_1/proj"]),
        ("out|proj", None, ["blocks_0/proj", "blocks_1/proj", "out"]),
        ("blocks_0/proj", None, ["blocks_0/proj"]),
        ("blocks_[01]/proj", (1, 0), ["blocks_0/proj", "blocks_1/proj"]),
        ("blocks_.", None, ["blocks_0", "blocks_1"]),
    ],
)
def test_find(pattern, layers, paths):
    assert [site.path for site in find(SITES, pattern, layers)] == paths


@pytest.mark.parametrize("pattern", ["pro", "roj", "blocks", "", "proj/"])
def test_find_takes_whole_parts_only(pattern):
    with pytest.raises(UserError, match="matches no site"):
        find(SITES, pattern)


def test_find_names_the_nearest():
    with pytest.raises(UserError, match=r"'prj' matches no site of the model: did you mean 'proj'"):
        find(SITES, "prj")
    with pytest.raises(UserError, match=r"matches no site of the model: did you mean 'proj'"):
        find(SITES, "blocks_0/projj")


def test_find_where_a_layer_is_missing():
    with pytest.raises(UserError, match=r"layer 2 has no site that matches 'proj': layers 0-1 do"):
        find(SITES, "proj", [0, 2])
    with pytest.raises(
        UserError, match=r"layer 0 has no site that matches 'out': its matches are not in numbered layers"
    ):
        find(SITES, "out", [0])


@pytest.mark.parametrize("layers", [(True,), (0.0,), (0, None), ("0",)])
def test_layers_that_are_no_integers(layers):
    with pytest.raises(UserError, match="layers must be integers, got"):
        find(SITES, "proj", layers)


def test_layers_may_be_numpy_integers():
    assert [site.path for site in find(SITES, "proj", np.arange(1, 2))] == ["blocks_1/proj"]


def test_find_with_a_bad_regular_expression():
    with pytest.raises(UserError, match=r"'\(proj' is not a regular expression"):
        find(SITES, "(proj")


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*query!", "(a|a)+b", "((a.*)?b){3,}", r"\)(x[)]){9}", "[]](a)*"])
def test_a_pattern_that_would_take_for_ever(pattern):
    with pytest.raises(UserError, match="repeats a group"):
        matches(pattern, "encoder/layer_0/attention/query")


@pytest.mark.parametrize("pattern", [r"a\)*", "[(b)*]+", "(?:a|b)?", "(a.*)(b*)?", r"[\])]*x", "(a)b*"])
def test_repeats_that_are_not_of_a_group(pattern):
    assert matches(pattern, "x") in (True, False)


def test_a_pattern_too_deep_for_the_parser():
    with pytest.raises(UserError, match="is not a regular expression"):
        matches("(" * 5000, "a/b")


def test_matches_whole_parts_from_the_end():
    assert matches("b/c", "a/b/c")
    assert matches("a/b/c", "a/b/c")
    assert matches("[bc]", "a/b/c")
    assert not matches("a/b", "a/b/c")
    assert not matches("b/c", "a/bb/c")
    assert not matches("x|b/c", "a/bb/c")


def test_what_is_below_a_layer():
    """Only a whole part of a path is one."""
    for path, below in (
        ("encoder/layer_3/ffn/output", "ffn/output"), ("graph_1/layer_2/query", "query"), ("pooler", "pooler"),
        ("graph_1/query", "graph_1/query"), ("h_0/attn", "attn"), ("layer_1", ""),
    ):  # fmt: skip
        assert within_layer(path) == below
