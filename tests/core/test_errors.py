import pytest

from jpeft.core.errors import UserError, nearest


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        ("lroa", ["lora", "adapter"], "did you mean 'lora'?"),
        ("bert", ["berta", "roberta", "x"], "did you mean 'berta' or 'roberta'?"),
        ("zzz", ["lora", "adapter"], "expected one of 'lora', 'adapter'"),
        ("zzz", ["only"], "expected one of 'only'"),
    ],
)
def test_nearest_names_close_choices_or_all(name, choices, expected):
    assert nearest(name, choices) == expected


def test_nearest_names_at_most_n_and_lists_at_most_forty():
    assert nearest("aaaa", ["aaab", "aaac", "aaad"], n=1).count("aaa") == 1
    many = nearest("zzz", (f"choice{i}" for i in range(41)))
    assert many.endswith("'choice39', ...")


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
