"""Every config that a user can name is a run that could start."""

import importlib.util
from pathlib import Path

import pytest

from jpeft.core.errors import UserError
from jpeft.data.tasks import TASKS
from jpeft.plans import plan as plans
from jpeft.run import checks
from jpeft.run import config as c
from jpeft.transforms.registry import METHODS
from jpeft.workbench import compare, search
from jpeft.workbench import space as spaces

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(
    path for path in FOLDER.glob("*.py") if path.stem != "glue" and not path.stem.startswith(("compare", "search"))
)
GRIDS = sorted(FOLDER.glob("compare_*.py"))
SEEDS = {"mnli": (11, 22, 88), "mrpc": (11, 22, 88), "sst2": (111, 11, 22)}


def get_config(path: Path, variant: str):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"configs/{path.name}" in module.__doc__, "the docstring gives the command"
    needs_none = path.stem.startswith(("compare", "search"))
    return module.get_config(variant) if variant or not needs_none else module.get_config()


def test_there_is_one_for_each_method_and_task():
    methods = ("fishpal", "lora", "adapter", "prefix", "full", "head")
    assert {path.stem for path in FILES} == {f"{method}_{task}" for method in methods for task in SEEDS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_fields_follow_the_name_of_the_file(path):
    config = get_config(path, "")
    method, task = path.stem.rsplit("_", 1)
    method = {"adapter": "pfeiffer"}.get(method, method)
    checks.check(config)
    assert (config.method, config.task, config.seeds) == (method, task, SEEDS[task])
    assert config.model == "bert-base-uncased"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_demo_needs_no_network(path):
    config = get_config(path, "demo")
    checks.check(config)
    assert (config.task, config.model, config.seeds) == ("synthetic", "minilm", (11,))


@pytest.mark.parametrize(
    ("method", "rate", "epochs", "warmup", "decay"),
    [
        ("fishpal", 5e-4, 10, 0.06, 0.1),
        ("lora", 5e-4, 10, 0.06, 0.1),
        ("adapter", 1e-4, 10, 0.06, 0.1),
        ("prefix", 2e-4, 10, 0.06, 0.1),
        ("full", 2e-5, 3, 0.1, 0.01),
        ("head", 1e-3, 3, 0.1, 0.01),
    ],
)
def test_recipes(method, rate, epochs, warmup, decay):
    config = get_config(FOLDER / f"{method}_mrpc.py", "")
    train = config.train
    assert (c.learning_rate(config), train.num_epochs, train.warmup_ratio, train.weight_decay) == (
        rate,
        epochs,
        warmup,
        decay,
    )
    assert (train.batch_size, train.max_length) == (16, 128)


@pytest.mark.parametrize("method", [*METHODS, "houlsby+layer_norm"])
def test_any_method_on_any_task(method):
    for task in TASKS:
        config = get_config(FOLDER / "glue.py", f"{method},{task}")
        assert (config.method, config.task) == (method, task)
        assert config.seeds == SEEDS.get(task, (11, 22, 88))
    checks.check(config)
    demo = get_config(FOLDER / "glue.py", f"{method},mrpc,demo")
    checks.check(demo)
    assert (demo.task, demo.model) == ("synthetic", "minilm")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_a_comparison_could_start(path):
    grid = get_config(path, "")
    compare.check(grid)
    assert len(compare.cells(grid)) > 1


def test_the_search_of_the_docs_could_start():
    search.check(get_config(FOLDER / "search_sst2.py", ""))


def test_the_search_could_start():
    for task in ("", "cola"):
        config = get_config(FOLDER / "search_autopeft.py", task)
        search.check(config)
        assert config.task == (task or "mrpc")
    # What Zhou et al. search: two adapters and a prefix of any of nine sizes, and a bit for each of MiniLM's layers.
    assert spaces.size(config.space, config.layers, 6) == (9**3 - 1) * (2**6 - 1)


def test_the_plans_of_the_comparison_are_of_one_size():
    grid = get_config(FOLDER / "compare_plans.py", "sst2")
    d, kinds = 384, {"lora": "rank", "pfeiffer": "bottleneck", "prefix": "num_virtual_tokens"}
    sizes, seen = [], []
    for fields in grid.variants.values():
        plan = plans.loads(fields["fishpal"]["plan"])
        entries = [entry for row in plan.values() for entry in row]
        factor = {"lora": 4 * d, "pfeiffer": 2 * d, "prefix": 2 * d}
        sizes.append(sum(factor[e.method] * e.options[kinds[e.method]] for e in entries))
        seen.append(plan)
    assert len(sizes) == 24
    assert set(sizes) == {6 * 32 * d}
    assert all(seen.count(plan) == 1 for plan in seen)


def test_the_files_and_the_names_agree():
    for path in FILES:
        method, task = path.stem.rsplit("_", 1)
        if method != "adapter":  # the thesis' learning rate, 1e-4
            assert get_config(path, "").to_dict() == get_config(FOLDER / "glue.py", f"{method},{task}").to_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected METHOD,TASK"),
        ("lora", "expected METHOD,TASK"),
        ("lroa,mrpc", "config.method 'lroa' is unknown: did you mean 'lora'"),
        ("lora,mprc", "config.task 'mprc' is unknown: did you mean 'mrpc'"),
        ("lora,mrpc,dmo", "config variant 'dmo' is unknown"),
        ("lora,mrpc,demo,x", "expected METHOD,TASK"),
    ],
)
def test_a_name_that_is_wrong(name, message):
    with pytest.raises(UserError, match=message):
        get_config(FOLDER / "glue.py", name)


def test_the_study_of_sizes_trains_what_was_published():
    grid = get_config(FOLDER / "compare_sizes.py", "mnli")
    for cell in compare.cells(grid):
        config = compare.config_of(grid, cell)
        if cell.variant.startswith("LoRA"):
            assert config.peft.lora.alpha == config.peft.lora.rank == int(cell.variant.split()[1])
        if cell.variant.startswith("houlsby"):
            assert config.method == "houlsby+layer_norm"
