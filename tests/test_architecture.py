"""The rooms of the house: imports are acyclic, and go down only."""

import ast
import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1] / "jpeft"
# From the ground up: a room may import from itself and from those before it.
ROOMS = (
    "core", "models", "importance", "transforms", "plans", "data", "training", "store", "report", "run", "serving",
    "workbench", "main", "compare", "search", "export", "predict", "submit",
)  # fmt: skip


def imports(path):
    """The modules of jpeft that a file imports, anywhere in it, as dotted names without "jpeft"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jpeft":
            for alias in node.names:
                parts = (*node.module.split(".")[1:], alias.name)
                found.add(resolved(parts) or resolved(parts[:-1]))
        elif isinstance(node, ast.Import):
            found |= {resolved(tuple(a.name.split(".")[1:])) for a in node.names if a.name.split(".")[0] == "jpeft"}
    return found - {None}


def resolved(parts):
    """The dotted name of a module, if there is one."""
    path = ROOT.joinpath(*parts)
    return (
        ".".join(parts) if parts and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()) else None
    )


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py", "version.py") or path.parent != ROOT
}
GRAPH = {name.removesuffix(".__init__"): imports(path) for name, path in FILES.items()}


def test_names_that_other_modules_import_are_public():
    private = []
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jpeft."):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    is_module = resolved((*node.module.split(".")[1:], name))
                    if hasattr(module, "__all__") and not is_module and name not in module.__all__:
                        private.append(f"{node.module}.{name}")
    assert not private, private


def test_every_module_is_in_a_room():
    assert {name.split(".")[0] for name in GRAPH} == set(ROOMS)


def test_imports_go_down_only():
    floor = {room: i for i, room in enumerate(ROOMS)}
    up = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if other != "version" and floor[other.split(".")[0]] > floor[name.split(".")[0]]
    ]
    assert not up, up


def test_imports_are_acyclic():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in GRAPH.get(name, ()):
                if other != name:
                    visit(other)
            path.pop()
            done.add(name)

    for name in GRAPH:
        visit(name)


NAMES = """
Chain Context Entry Merged Plan Saved Setting Site Summary Transform UserError adamix adapterdrop apply bitfit build
chain dora far find fish fisher fisher_average fishpal fold houlsby ia3 init instances krona ladder_side layer_norm
layers load lora magnitude_mask mam merge p_tuning packed parallel pfeiffer pissa predict prefix prepare prompt
random_mask read_mask rslora said sites sparse_adapter summary top top_k_layers unipelt write_mask METHODS __version__
"""


def test_the_names_of_earlier_versions_are_public():
    import jpeft

    assert set(NAMES.split()) <= set(jpeft.__all__)
    assert all(hasattr(jpeft, name) for name in jpeft.__all__)
