"""The table of what trains and what stays."""

import jax
import pytest

import jpeft
from jpeft.core import tree
from jpeft.core.leaves import init_sites
from jpeft.core.summary import Row, summary
from jpeft.core.transform import Transform


def test_rows_are_counted_by_layer_and_method(toy, key):
    method = jpeft.chain(jpeft.prefix(3, 8), jpeft.lora(2, layers=[1]), jpeft.pfeiffer(4, layers=[0]))
    leaves = jpeft.init(method, key, toy.sites)
    head = {"classifier": toy.params["classifier"]}
    made = summary(method, leaves, toy.params, head)
    linear = lambda n, m: n * m + m
    assert made.rows == (
        Row("0-1", "prefix_0", 2 * 2 * linear(8, 16), 2 * 2 * 3 * 16, 4 * 2 * 2 * 3 * 16),
        Row("shared", "prefix_0", 3 * 16 + linear(16, 8), 0, 0),
        Row("1", "lora_0", 2 * 2 * 2 * 16, 0, 0),
        Row("0", "pfeiffer_0", linear(16, 4) + linear(4, 16), linear(16, 4) + linear(4, 16), 4 * 148),
        Row("", "classifier", 51, 0, 0),
    )
    assert made.base == tree.count(toy.params)
    assert sum(row.trainable for row in made.rows) == tree.count(leaves) + 51


def test_the_text_has_a_total_and_percentages(toy, key):
    method = jpeft.lora(2)
    text = str(summary(method, jpeft.init(method, key, toy.sites), toy.params)).splitlines()
    assert text[0].split("|")[1:4] == [" layers ", " method ", " trains "]
    share = f"{100 * 256 / tree.count(toy.params):.3f}"
    assert [cell.strip() for cell in text[-1].split("|")[1:5]] == ["", "total", "256", share]
    assert len({len(line) for line in text}) == 1


@pytest.mark.parametrize("merges", [True, False])
def test_fixed_leaves_do_not_train_but_count_where_they_stay(toy, key, merges):
    def init(key, sites, params):
        where = [sites["encoder/layer_0/ffn"]]
        return init_sites(key, where, lambda k, s: {"w": jax.numpy.ones(3), "fixed": {"i": jax.numpy.arange(5)}})

    method = Transform("mine", init, lambda *a: a[2](*a[3]), (lambda leaves, params: params) if merges else None)
    (row,) = summary(method, jpeft.init(method, key, toy.sites), toy.params).rows
    assert row == Row("0", "mine_0", 3, *((0, 0) if merges else (8, 32)))
