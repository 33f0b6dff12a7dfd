import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jpeft import UserError
from jpeft.core import files


def test_text_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "text"
    files.write_text(path, "one ± two\n")
    assert path.read_bytes() == "one ± two\n".encode()
    files.write_text(path, "other")
    assert path.read_text() == "other"
    assert [file.name for file in path.parent.iterdir()] == ["text"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "text"
    files.write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half \ud800")
    assert path.read_text() == "before"


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "±"}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.append_json(tmp_path / "x.jsonl", {"a": value})
    assert not (tmp_path / "x.json").exists()


def test_appended_rows_are_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"a": 1}, {"a": "line\nbreak"}]
    for row in rows:
        files.append_json(path, row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_keep_lines_drops_the_unwanted_and_the_line_cut_short(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": 1, "b')
    files.keep_lines(path, lambda row: row["a"] != 2)
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    files.append_json(path, {"a": 4})
    assert path.read_text().endswith('{"a": 3}\n{"a": 4}\n')


def test_keep_lines_makes_no_file(tmp_path):
    files.keep_lines(tmp_path / "none", lambda row: True)
    assert not (tmp_path / "none").exists()


def test_leaves_come_back_with_their_empty_dicts_and_a_path_may_be_text(tmp_path):
    leaves = {"x_0": {"shared": {"v": np.ones(2, np.float32)}, "encoder/layer_0": {}}, "fish_0": {}}
    files.write_leaves(str(tmp_path / "x.safetensors"), leaves)
    back = files.read_leaves(str(tmp_path / "x.safetensors"))
    assert jax.tree.structure(back) == jax.tree.structure(leaves)
    np.testing.assert_array_equal(back["x_0"]["shared"]["v"], [1, 1])
    with pytest.raises(UserError, match="there is no file"):
        files.read_leaves(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a safetensors file"):
        files.read_leaves(tmp_path / "bad")


def test_files_are_as_readable_as_any_other(tmp_path):
    files.write_leaves(tmp_path / "x.safetensors", {"a": np.ones(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_leaves_keep_their_types_and_shapes(tmp_path):
    leaves = {
        "h": jnp.ones((2, 0), jnp.bfloat16),
        "s": np.float32(3),
        "i": np.arange(3),
        "b": jnp.ones(2, jnp.bfloat16),
    }
    files.write_leaves(tmp_path / "x", leaves)
    back = files.read_leaves(tmp_path / "x")
    assert {k: (x.shape, x.dtype.name) for k, x in back.items()} == {
        "h": ((2, 0), "bfloat16"), "s": ((), "float32"), "i": ((3,), "int32"), "b": ((2,), "bfloat16"),
    }  # fmt: skip


def test_numbers_of_64_bits_are_not_cut_down(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_leaves(path, {"a": np.array([2**40 + 1]), "b": np.array([1e300]), "c": np.array([0.1, 1.0, np.nan])})
    found = files.read_leaves(path)
    assert (found["a"].dtype, int(found["a"][0])) == (np.int64, 2**40 + 1)
    assert float(found["b"][0]) == 1e300
    assert found["c"].dtype == np.float64
    np.testing.assert_array_equal(found["c"], [0.1, 1.0, np.nan])


def test_arrays_of_the_other_byte_order(tmp_path):
    files.write_leaves(tmp_path / "x", {"a": np.array([1.5, -2.0], ">f4"), "b": np.array([3], ">i8")})
    back = files.read_leaves(tmp_path / "x")
    assert (back["a"].tolist(), back["b"].tolist()) == ([1.5, -2.0], [3])


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ({"a:b": np.ones(1), "a": {"b": np.zeros(1)}}, "two leaves have the name 'a:b'"),
        ({"a:b": {}, "a": {"b": np.zeros(1)}}, "two leaves have the name 'a:b'"),
        ({"a:b": np.ones(1), "a": np.zeros(1)}, "'a' is a leaf and holds others"),
        ({"a": {1: np.ones(1)}}, "the keys of leaves must be text, got 1"),
        ({"a": {None: {}}}, "the keys of leaves must be text, got None"),
        ({"__metadata__": np.ones(1)}, "has a meaning of its own"),
        ({"\ud800": np.ones(1)}, "cannot be written as UTF-8"),
    ],
)
def test_keys_that_a_file_cannot_hold(tmp_path, leaves, says):
    with pytest.raises(UserError, match=says) as caught:
        files.write_leaves(tmp_path / "x.safetensors", leaves)
    str(caught.value).encode()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file_to_write(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    for write in (lambda: files.write_leaves(folder, {"a": np.ones(1)}), lambda: files.write_text(folder, "text")):
        with pytest.raises(UserError, match="is a folder, where a file is to be written"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("leaves", [None, [1], {"a": "text"}, {"a": {"b": None}}])
def test_what_is_no_tree_of_arrays(tmp_path, leaves):
    with pytest.raises(UserError, match=r"expected a nested dict of arrays|is not an array of numbers"):
        files.write_leaves(tmp_path / "x.safetensors", leaves)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_leaves(path, {"a": {"b": np.arange(4, dtype=np.float32)}, "c": {}}, {"about": "text"})
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            back, about = files.read_tensors(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:  # a space that pads the header
            np.testing.assert_array_equal(back["a:b"], np.arange(4))
            assert about["about"] == "text"


def test_safetensors_of_others_are_no_leaves(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "x")
    with pytest.raises(UserError, match="does not carry their sha256"):
        files.read_leaves(tmp_path / "x")


def test_records_come_back_and_changes_are_found(tmp_path):
    path = tmp_path / "x.json"
    files.write_record(path, "thing", {"scores": {10: 0.1, 2: [1, None]}, "text": "±"})
    assert files.read_record(path, "thing") == {"scores": {"10": 0.1, "2": [1, None]}, "text": "±"}
    with pytest.raises(UserError, match="is not a other"):
        files.read_record(path, "other")
    whole = path.read_text()
    for old, new in (("0.1", "0.2"), ("\\u00b1", "+"), ('"10"', '"11"'), ("null", "0")):
        path.write_text(whole.replace(old, new))
        with pytest.raises(UserError, match="was changed or damaged"):
            files.read_record(path, "thing")
    for text in ("", "{}", "[]", "3", whole[:-3], '{"kind": "thing"}', "[" * 100_000, "\ud800"):
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(UserError, match=r"x\.json") as caught:
            files.read_record(path, "thing")
        assert "\n" not in str(caught.value)


def test_lines_of_no_row_are_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n[]\n3\n\xff\n{"b": 1}\n{"a": 2}\n')
    files.keep_lines(path, lambda row: row["a"] > 0)
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_record_that_lacks_what_its_kind_has_to_hold(tmp_path):
    path, kind = tmp_path / "x.json", files.Kind("thing", {"name": str, "sizes": list[int], "note": str | None})
    files.write_record(path, kind, {"name": "a", "sizes": [1, 2], "more": None})
    assert files.read_record(path, kind) == {"name": "a", "sizes": [1, 2], "more": None}
    for fields, says in (({"name": "a"}, "it has no sizes"), ({"name": "a", "sizes": [True]}, r"its sizes\.0 is True")):
        files.write_record(path, kind, fields)
        with pytest.raises(UserError, match=rf"x\.json is not a thing of this version of jpeft: {says}"):
            files.read_record(path, kind)
        assert files.read_record(path, "thing") == fields


def test_a_list_is_no_dict(tmp_path):
    """It would come back as one array."""
    with pytest.raises(UserError, match="a:b is a list, which would be read back as one array: use a dict"):
        files.write_leaves(tmp_path / "x", {"a": {"b": [np.ones(3), np.zeros(3)]}})
