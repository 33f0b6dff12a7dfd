"""The README's code runs as it stands, and says what is true."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

import jpeft

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs_and_does_what_its_comments_say():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    model, x, params, leaves = (names[name] for name in ("model", "x", "params", "leaves"))
    assert set(leaves) == {"lora_0"}
    assert set(leaves["lora_0"]) == {"layers_0", "layers_2"}
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(leaves)
    assert jax.tree.structure(names["information"]) == jax.tree.structure(leaves)
    moved = jax.tree.map(lambda a: a + 0.1, leaves)
    merged = jpeft.merge(names["method"], moved, params).params
    wrapped = jpeft.apply(model, names["method"], {"params": params, "peft": moved}, x)
    assert jnp.allclose(model.apply({"params": merged}, x), wrapped, atol=1e-5)
    assert not jnp.allclose(model.apply({"params": params}, x), wrapped, atol=1e-2)


def test_every_file_and_command_that_the_readme_names_exists():
    root = Path(__file__).parents[1]
    for config in re.findall(r"configs/\w+\.py", README):
        assert (root / config).is_file(), config
    targets = re.findall(r"^(\w+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert target in targets
