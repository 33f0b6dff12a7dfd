"""The README's code runs as it stands, and says what is true."""

import re
from pathlib import Path

import jax.numpy as jnp
import optax

import jpeft

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_library_example_trains_and_does_what_its_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it writes a file
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out == "layers_0 layers_2\n"
    assert jpeft.read_leaves("lora.safetensors").keys() == {"lora_0"}
    model, x, y, params, parts = (names[name] for name in ("model", "x", "y", "params", "parts"))
    assert set(names["leaves"]["lora_0"]) == {"layers_0"}
    assert set(parts.trainable["params"]) == {"layers_2"}

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

    assert loss(names["merged"]) < 0.5 * loss(params)
    wrapped = jpeft.apply(model, names["method"], names["trained"], x)
    assert jnp.allclose(model.apply({"params": names["merged"]}, x), wrapped, atol=1e-5)


def test_every_file_and_command_that_the_readme_names_exists():
    root = Path(__file__).parents[1]
    for file in re.findall(r"(?:configs|examples|docs|tests|jpeft)/\w+(?:/\w+)*\.\w+", README):
        assert (root / file).is_file(), file
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert target in targets
