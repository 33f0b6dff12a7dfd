import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jpeft.core import files
from jpeft.core.errors import UserError
from jpeft.data.batching import Examples
from jpeft.data.padding import Part
from jpeft.data.task import Data
from jpeft.data.tasks import TASKS
from jpeft.models import pretrained
from jpeft.run import config as configs
from jpeft.run import workdir as workdirs
from jpeft.version import RESULTS


def examples(words=(2, 5, 3), label=1):
    rows = (np.array(words, np.int32), np.array([2, 3], np.int32))
    return Examples(rows, tuple(np.zeros_like(row) for row in rows), np.array([label, 0], np.int32))


def data(**changes):
    parts = {"train": examples(), "dev": examples(), **changes}
    return Data(TASKS["mrpc"], parts["train"], parts["dev"], ((Part(16, 8),),), (8,), parts.get("others", {}))


@pytest.fixture(scope="module")
def base(tiny_model):
    return pretrained.load(tiny_model, num_labels=2, key=jax.random.key(0))


@pytest.fixture
def begun(tmp_path, tiny_config, base):
    workdirs.begin(tmp_path, tiny_config("lora"), workdirs.inputs(data(), base, "here"))
    files.write_text(tmp_path / "seed_11" / "plan.json", "{}")
    return tmp_path


def test_a_run_that_computed_nothing_leaves_its_workdir_to_another(tmp_path, tiny_config, base):
    workdirs.begin(tmp_path, tiny_config("lora"), workdirs.inputs(data(), base, "here"))
    other = workdirs.inputs(data(train=examples(label=0)), base, "here")
    workdirs.check_config(tmp_path, tiny_config("prefix"))
    workdirs.begin(tmp_path, tiny_config("prefix"), other)
    assert files.read_record(tmp_path / "config.json", workdirs.KIND)["method"] == "prefix"


@pytest.mark.parametrize(
    ("name", "value"), [("train", None), ("dev", [3]), ("others", []), ("labels", "no"), ("results", True), ("base", 3)]
)
def test_a_list_of_inputs_that_no_run_writes(begun, tiny_config, base, name, value):
    """Its hash is right: anyone can compute it."""
    read = files.read_record(begun / "inputs.json", workdirs.INPUTS_KIND)
    lacking = {key: x for key, x in read.items() if key != name}
    for fields, says in ((lacking, f"it has no {name}"), ({**read, name: value}, f"its {name} is ")):
        files.write_record(begun / "inputs.json", workdirs.INPUTS_KIND, fields)
        for use in (
            lambda: workdirs.begin(begun, tiny_config("lora"), workdirs.inputs(data(), base, "here")),
            lambda: workdirs.owner(begun, tiny_config("lora"), 11),
        ):
            with pytest.raises(UserError, match=f"inputs.json is not a list of .* of this version of jpeft: {says}"):
                use()
        with pytest.raises(UserError, match="which holds another run"), workdirs.locked(begun / "runs/mine"):
            pass


def test_a_field_that_a_later_version_adds_is_no_change(begun, tiny_config, monkeypatch):
    config, whole = tiny_config("lora"), workdirs.configs.default

    def earlier(task, method):
        found = whole(task, method)
        del found.train["remat"]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(workdirs.configs, "default", earlier)
        before = config.copy_and_resolve_references()
        del before.train["remat"]
        files.write_record(begun / "config.json", workdirs.KIND, workdirs._json(before))
        owner = workdirs.owner(begun, before, 11)
    workdirs.check_config(begun, config)
    assert workdirs.owner(begun, config, 11) == owner
    config.train.remat = True
    with pytest.raises(UserError, match=r"train\.remat was None, now True"):
        workdirs.check_config(begun, config)
    assert workdirs.owner(begun, config, 11) != owner


def test_another_method_or_task_with_the_same_fields_is_another_owner(begun, tiny_config):
    one, method, task = (tiny_config("bitfit") for _ in range(3))
    method.method, task.task = "layer_norm", "stsb"
    assert configs.chosen(one) == configs.chosen(method) == configs.chosen(task)
    assert len({workdirs.owner(begun, each, 11) for each in (one, method, task)}) == 3


def test_the_dtype_is_the_machine_s_and_is_written_down(begun, tiny_config, monkeypatch):
    config, before = tiny_config("lora"), tiny_config("lora", dtype="float32")
    assert workdirs.read_config(begun).train.dtype == "float32"
    workdirs.check_config(begun, config)
    workdirs.check_config(begun, before)
    owners = [workdirs.owner(begun, each, 11) for each in (config, before)]
    assert owners[0] == owners[1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"config\.train\.dtype was 'float32', now 'bfloat16'"):
        workdirs.check_config(begun, config)
    workdirs.check_config(begun, before)
    assert workdirs.owner(begun, config, 11) != owners[0]
    assert workdirs.owner(begun, before, 11) == owners[0]


def test_a_run_in_another_run_is_refused(begun):
    for inside in ("seed_11/model", "runs/mine"):
        with pytest.raises(UserError, match=r"lies in .*, which holds another run"), workdirs.locked(begun / inside):
            pass


def test_a_file_of_that_name_above_is_no_run(tmp_path):
    (tmp_path / "inputs.json").write_text("{}")
    with workdirs.locked(tmp_path / "runs" / "mine"):
        pass


def test_a_name_that_no_system_takes_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has a name of 4,\d+ characters"), workdirs.locked(tmp_path / ("a/" * 2000)):
        pass


def refusal(begun, tiny_config, now):
    with pytest.raises(UserError, match="was started with has changed") as caught:
        workdirs.begin(begun, tiny_config("lora"), now)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_equal_inputs_pass_wherever_they_are(begun, tiny_config, base):
    workdirs.begin(begun, tiny_config("lora"), workdirs.inputs(data(), base, "there"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"train": examples(words=(2, 6, 3))},
            "the training data: as many rows (2), with other contents, read from there, was here",
        ),
        ({"train": examples(label=0)}, "the training data: as many rows"),
        ({"dev": Examples((), (), np.zeros(0, np.int32))}, "the evaluation data: 2 rows, now 0"),
        ({"others": {"test": examples()}}, "the data of other splits: none, now 2 rows of test"),
    ],
)
def test_other_rows_are_named(begun, tiny_config, base, changed, says):
    assert says in refusal(begun, tiny_config, workdirs.inputs(data(**changed), base, "there"))


def test_other_labels_and_another_task_file_are_named(begun, tiny_config, base, tmp_path):
    renamed = dataclasses.replace(TASKS["mrpc"], labels=("no", "yes"))
    told = refusal(begun, tiny_config, workdirs.inputs(data()._replace(task=renamed), base, "here"))
    assert "the labels: ['not_equivalent', 'equivalent'], now ['no', 'yes']" in told
    (tmp_path / "own.py").write_text("# a task")
    told = refusal(begun, tiny_config, workdirs.inputs(data(), base, "here", str(tmp_path / "own.py")))
    assert "the file that defines the task" in told


def test_rows_cut_elsewhere_are_other_rows():
    """The same tokens in the same order, as rows of other lengths."""
    one, other = (
        Examples(
            tuple(np.split(np.arange(4, dtype=np.int32), [at])), (np.zeros(at), np.zeros(4 - at)), np.zeros(2, np.int32)
        )
        for at in (1, 2)
    )
    assert workdirs._digest(one) != workdirs._digest(other)


def test_other_weights_and_another_tokenizer_are_named(begun, tiny_config, base, tmp_path):
    changed = {**base.params, "encoder": jax.tree.map(lambda x: x + 1e-6, base.params["encoder"])}
    assert "the base model's weights" in refusal(
        begun, tiny_config, workdirs.inputs(data(), base._replace(params=changed), "here")
    )
    head = {**base.params, "classifier": jax.tree.map(lambda x: x + 1, base.params["classifier"])}
    workdirs.begin(begun, tiny_config("lora"), workdirs.inputs(data(), base._replace(params=head), "here"))
    shutil.copytree(base.folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    told = refusal(begun, tiny_config, workdirs.inputs(data(), base._replace(folder=tmp_path / "copy"), "here"))
    assert "the tokenizer's files" in told
    assert "the base model's weights" not in told
    other = base._replace(config=dataclasses.replace(base.config, hidden_act="relu"))
    told = refusal(begun, tiny_config, workdirs.inputs(data(), other, "here"))
    assert "changed: the base model's config.json. Restore" in told


def test_other_results_of_the_code_are_named(begun, tiny_config, base):
    told = refusal(begun, tiny_config, workdirs.inputs(data(), base, "here", results=99))
    assert f"other results (number {RESULTS} before, 99 now)" in told


def test_seeds_can_be_added_and_nothing_else_changed(begun, tiny_config):
    more = tiny_config("lora")
    more.seeds = (22, 11)
    workdirs.check_config(begun, more)
    fewer = tiny_config("lora")
    fewer.seeds = (22,)
    with pytest.raises(UserError, match=r"config\.seeds was \[11\], now \[22\]"):
        workdirs.check_config(begun, fewer)
    more.train.batch_size = 3
    with pytest.raises(UserError, match=r"config\.train\.batch_size was \d+, now 3"):
        workdirs.check_config(begun, more)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seeds": 3}', "\xff", "[" * 100_000])
def test_a_broken_config_is_one_line(begun, tiny_config, text):
    (begun / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        workdirs.check_config(begun, tiny_config("lora"))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_inputs_that_are_gone_or_edited_are_refused(begun, tiny_config, base):
    now = workdirs.inputs(data(), base, "here")
    path = begun / "inputs.json"
    edited = json.loads(path.read_text()) | {"base": "0"}
    path.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"inputs\.json was changed"):
        workdirs.begin(begun, tiny_config("lora"), now)
    path.unlink()
    with pytest.raises(UserError, match=r"holds results, but no inputs\.json"):
        workdirs.begin(begun, tiny_config("lora"), now)


@pytest.mark.parametrize("how", ["gone", "edited"])
def test_a_config_that_is_gone_or_edited_is_refused(begun, tiny_config, how):
    """Or another config could take over results that are not its own."""
    path = begun / "config.json"
    if how == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"weight_decay": 0.1', '"weight_decay": 0.3'))
    with pytest.raises(UserError, match=r"holds results, but no config\.json|was changed or damaged"):
        workdirs.check_config(begun, tiny_config("lora"))


@pytest.mark.parametrize("path", ["/", ".", "..", "~", "\udcff", "a\0b"])
def test_a_workdir_of_other_things_or_of_no_name_is_refused(path):
    with pytest.raises(UserError, match="workdir"), workdirs.locked(Path(path).expanduser()):
        pass


def test_a_workdir_is_held_by_one_at_a_time(tmp_path):
    with workdirs.locked(tmp_path / "a" / "b"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), workdirs.locked(tmp_path / "a/b"):
            pass
        with workdirs.locked(tmp_path / "c"):
            pass
    with workdirs.locked(tmp_path / "a" / "b"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    """The lock alone, in a process that imports nothing else of jpeft's."""
    held = f"import fcntl, time; f = open({str(tmp_path / '.lock')!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{held} print('held', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use by"), workdirs.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while True:
        try:
            with workdirs.locked(tmp_path):
                break
        except UserError:
            assert time.monotonic() < until


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    told = []
    with workdirs.locked(tmp_path, told.append):
        pass
    assert "cannot be locked" in told[0]


def test_the_current_folder_may_be_a_workdir_of_its_own(tmp_path, monkeypatch):
    """If it is empty, or holds a run."""
    monkeypatch.chdir(tmp_path)
    with workdirs.locked(Path(".")):
        files.write_text(tmp_path / "inputs.json", "")
    with workdirs.locked(Path(".")):
        pass


@pytest.mark.parametrize("name", workdirs.WRITTEN)
def test_files_of_something_else_are_not_overwritten(tmp_path, name):
    """As those of the base model's folder."""
    files.write_text(tmp_path / name, "{}")
    with pytest.raises(UserError, match="that is not of a run"), workdirs.locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_that_was_copied_without_its_lock_is_a_run(begun):
    assert not (begun / ".lock").exists()
    with workdirs.locked(begun):
        pass


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="is not the name of a folder"), workdirs.locked(tmp_path / "a"):
        pass


@pytest.mark.parametrize("name", ["result.json", "predictions.safetensors", "plan.json", "model", "checkpoints"])
def test_what_is_neither_file_nor_folder_is_refused_before_anything_is_rewritten(begun, name):
    folder = begun / "seed_11"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = "." in name
    (folder / name).mkdir() if file else (folder / name).touch()
    with pytest.raises(UserError, match=f"{name} is not a {'file' if file else 'folder'}"), workdirs.locked(begun):
        pass
    os.rmdir(folder / name) if file else os.unlink(folder / name)
    (folder / name).symlink_to(name)
    with pytest.raises(UserError, match=f"{name} is not a {'file' if file else 'folder'}"), workdirs.locked(begun):
        pass
    (folder / name).unlink()
    with workdirs.locked(begun):
        pass


@pytest.mark.parametrize("how", ["touch", "symlink_to"])
def test_a_seed_that_is_no_folder_is_refused_before_anything_is_rewritten(begun, how):
    shutil.rmtree(begun / "seed_11", ignore_errors=True)
    getattr(begun / "seed_11", how)(*(["seed_11"] if how == "symlink_to" else []))
    with pytest.raises(UserError, match="seed_11 is not a folder, as a seed's must be"), workdirs.locked(begun):
        pass


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_where_a_folder_should_be(tmp_path, where):
    files.write_text(tmp_path / "file", "text")
    with pytest.raises(UserError, match="expected a folder"), workdirs.locked(tmp_path / where):
        pass
