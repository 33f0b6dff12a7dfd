from typing import Any, NamedTuple, get_type_hints

import pytest

from jpeft.core.schema import misfit


class Row(NamedTuple):
    name: str
    pair: tuple[int, str]
    scores: dict[str, float]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, float), (1.5, float), (True, bool), (None, None | str), ("a", str | None), ([], list[int]), ({}, dict),
        ([1, "a"], tuple[int, str]), (["a", "b", "c"], tuple[str, ...]), ([], tuple[str, ...]), ({"a": [1]}, Any),
        ({"a": None}, dict[str, float | None]), ({"a": 1, "z": 2}, {"a": int}), ([{"a": 1}, {"a": 2}], [{"a": int}]),
        ({"name": "a", "pair": [1, "x"], "scores": {"f1": 1}}, get_type_hints(Row)),
        ({}, {"a": int | None, "b": Any}),
    ],
)  # fmt: skip
def test_what_fits(value, kind):
    assert not misfit(value, kind)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (True, int, "it is True"), (1, bool, "it is 1"), (1.5, int, "it is 1.5"), (True, float, "it is True"),
        ("a", list[str], "it is 'a'"), ("ab", tuple[str, ...], "it is 'ab'"), (["a", 1], tuple[str, ...], "its 1 is 1"),
        ([1], tuple[int, str], "it is [1]"), ([1, 2], tuple[int, str], "its 1 is 2"), (3, {"a": int}, "it is 3"),
        ({"b": 1}, {"a": int}, "it has no a"), ({"a": {}}, {"a": {"b": int}}, "it has no a.b"),
        ({"a": None}, {"a": int}, "its a is None"), ({"a": "x"}, dict[str, int], "its a is 'x'"),
        ([], dict, "it is []"),
        ([{"a": 1}, {}], [{"a": int}], "it has no 1.a"), ({"a": [1]}, {"a": int | None}, "its a is [1]"),
        ({"a": "x" * 100}, {"a": int}, f"its a is '{'x' * 59}"), ({"a": "\n"}, {"a": int}, "its a is '\\n'"),
    ],
)  # fmt: skip
def test_what_does_not(value, kind, says):
    assert misfit(value, kind) == says
