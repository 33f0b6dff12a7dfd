import struct

import numpy as np
import pytest

from jpeft.report import plots

MIXED = {layer: {"prefix": 10.0**-layer, "adapter": 3.0, "lora": 0.0} for layer in range(4)}


def kept(by_seed):
    return {seed: {layer: max(row, key=row.get) for layer, row in of.items()} for seed, of in by_seed.items()}


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_picture_grows_with_seeds_and_layers(tmp_path):
    sizes = {}
    for seeds in (1, 3):
        for layers in (2, 4):
            path = tmp_path / f"{seeds}_{layers}.png"
            of = {seed: dict(list(MIXED.items())[:layers]) for seed in range(seeds)}
            plots.choice(path, of, kept(of), "title")
            sizes[seeds, layers] = size(path)
    # 2.6 + 0.72 layers by 0.9 + seeds (0.5 candidates + 0.75) inches, 150 dots each.
    assert sizes[1, 2] == (int(150 * 4.04), int(150 * 3.15))
    assert sizes[3, 4] == (int(150 * 5.48), int(150 * 7.65))


@pytest.mark.parametrize(
    "scores",
    [
        {0: {"lora": 0.0, "adapter": 0.0}, 1: {"lora": 0.0, "adapter": 0.0}},
        {0: {"lora": 2.0, "adapter": 2.0}, 1: {"lora": 2.0, "adapter": 2.0}},
        {0: {"lora": 1.0}},
        {0: {"lora": 1e-300, "adapter": 1e300}},
        {0: {"lora": -1e-3, "adapter": 2e-3}, 1: {"lora": 0.0, "adapter": -1.0}},
    ],
    ids=["zero", "constant", "single", "extreme", "negative"],
)
def test_odd_scores_are_drawn(tmp_path, scores):
    plots.choice(tmp_path / "x.png", {1: scores}, kept({1: scores}), "title")
    assert min(size(tmp_path / "x.png")) > 100


def test_a_race_has_a_panel_a_seed(tmp_path):
    found = {
        "steps": 12,
        "held_out_losses": [{"lora": 0.9, "prefix": 0.8, "pfeiffer": 1.0}, {"lora": 0.7, "prefix": 0.75}],
        "scores": {"0": {"lora": 3.0, "pfeiffer": 1.0, "prefix": 2.0}},
    }
    for seeds in (1, 3):
        plots.race(tmp_path / "x.png", dict.fromkeys(range(seeds), found), "title")
        assert size(tmp_path / "x.png") == (round(150 * (1.2 + 3.4 * seeds)), 480)
    plain = (tmp_path / "x.png").read_bytes()
    raced = {**found, "rate": 4.0, "rate_losses": {"1": 0.7, "4": 0.6}}
    plots.race(tmp_path / "x.png", dict.fromkeys(range(3), raced), "title")
    assert (tmp_path / "x.png").read_bytes() != plain


def test_a_seed_without_scores_beside_one_with(tmp_path):
    zero = {layer: dict.fromkeys(row, 0.0) for layer, row in MIXED.items()}
    plots.choice(tmp_path / "x.png", {1: zero, 2: MIXED}, {1: {}, 2: kept({2: MIXED})[2]}, "title")
    assert min(size(tmp_path / "x.png")) > 100


def test_the_map_has_a_row_a_module_and_a_column_a_layer(tmp_path):
    found = {
        f"params:encoder:layer_{i}:ffn:{name}:kernel": np.full((3, 2), 10.0**-i) for i in range(4) for name in "abc"
    }
    path = tmp_path / "x.png"
    plots.fisher_map(path, found, "title")
    assert size(path) == (int(150 * (4.2 + 0.42 * 4)), int(150 * (1.2 + 0.22 * 3)))
    plots.fisher_map(path, {**found, "params:embeddings:word_embeddings:embedding": np.ones(3)}, "title")
    assert size(path) == (int(150 * (4.2 + 0.42 * 5)), int(150 * (1.2 + 0.22 * 4)))
    plots.fisher_map(path, {name: 0 * x for name, x in found.items()}, "title")
    assert min(size(path)) > 100


def test_rounding_error_does_not_take_up_the_scale_of_a_map(tmp_path):
    """However far below it is, what is next to nothing looks the same and leaves others their colours."""
    found = {f"params:encoder:layer_{i}:ffn:kernel": np.full(2, 10.0**-i) for i in range(3)}
    pictures = []
    for least in (1e-9, 1e-25, 1e-5):
        everything = {**found, "params:encoder:layer_3:ffn:kernel": np.full(2, least)}
        plots.fisher_map(tmp_path / "x.png", everything, "title")
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_curves_have_a_line_for_every_seed(tmp_path):
    rows = [{"epoch": i, "train_loss": 1 / i, "accuracy": 0.6 + 0.02 * i} for i in (1, 2, 3)]
    plots.curves(tmp_path / "one.png", {11: rows}, "accuracy", 0.68, "title")
    plots.curves(tmp_path / "two.png", {11: rows, 22: rows[::-1]}, "accuracy", 0.68, "title")
    assert size(tmp_path / "one.png") == size(tmp_path / "two.png") == (1080, 408)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
