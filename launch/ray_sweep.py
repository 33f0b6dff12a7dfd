"""A sweep over configs and seeds on Ray, on this machine or on a cluster:

    pip install '.[ray]'
    python launch/ray_sweep.py --workdir runs/a --configs configs/lora_mrpc.py fishpal,mrpc --seeds 1 2 3
    python launch/ray_sweep.py --workdir runs/b --configs lora,mnli --seeds 1 2 --address auto -- --config.model=minilm

Each config with each seed is a run of its own, in <workdir>/<config>_seed_<seed>, where log.txt has what it prints.
What stands after -- goes to all runs. A run whose worker or machine is lost starts again on another and resumes from
its last checkpoint. So does every run when the sweep is stopped and the same command is given again. On a cluster, all
machines have jpeft and the present folder, on a file system that they share.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jpeft.core.errors import UserError, nearest
from jpeft.run import command

LOG = "log.txt"
FLAGS = ("workdir", "configs", "seeds", "gpus", "cpus", "retries", "address", "help")


class Run(NamedTuple):
    """One config with one seed.

    Attributes:
      config: the name of the config.
      seed: its only seed.
      folder: its workdir.
      arguments: for `jpeft.main`.
    """

    config: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own arguments, and those for all runs.

    Raises:
      UserError: for whatever is wrong.
    """
    parser = command.Parser(
        "python launch/ray_sweep.py",
        usage="%(prog)s --workdir FOLDER --configs CONFIG ... --seeds SEED ... [-- --config.field=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="where all runs go")
    parser.add_argument("--configs", nargs="+", required=True, metavar="CONFIG", help="files, or METHOD,TASK")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="SEED", help="of every config")
    parser.add_argument("--gpus", type=int, help="GPUs of a run; 1 by default where there are any, else 0: on the CPU")
    parser.add_argument(
        "--cpus",
        type=int,
        default=1,
        help="CPU cores of a run, 1 by default: it computes with as many threads, and as many runs go at once as the "
        "machines have cores (and GPUs) for",
    )
    parser.add_argument("--retries", type=int, default=10, help="how many lost workers a run survives, 10 by default")
    parser.add_argument("--address", default="local", help="of a cluster, or auto; by default only this machine")
    end = argv.index("--") if "--" in argv else len(argv)
    given, unknown = parser.parse_known_args(argv[:end])
    shared = list(argv[end + 1 :])
    for arg in unknown:
        name = arg.lstrip("-").split("=")[0]
        if name.startswith("config."):
            raise UserError(f"{arg}: fields of the config stand at the end, after a --")
        raise UserError(f"unknown argument {arg!r}: {nearest(name, FLAGS)}")
    for name, least in (("gpus", 0), ("cpus", 1), ("retries", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    for name in ("configs", "seeds"):
        values = getattr(given, name)
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UserError(f"--{name}: {twice[0]} is there twice")
    for arg in shared:
        if not arg.startswith("--config.") or "=" not in arg:
            raise UserError(f"{arg!r} after --: expected fields of the config, such as --config.train.num_epochs=3")
        if arg.startswith("--config.seeds="):
            raise UserError(f"{arg}: a sweep has --seeds in its place")
    return given, shared


def runs(workdir: Path, configs: Sequence[str], seeds: Sequence[int], shared: Sequence[str]) -> list[Run]:
    """All runs, seed by seed, each checked as far as it can be without data.

    Raises:
      UserError: for the first one that could not start.
    """
    from jpeft.run import checks
    from jpeft.run import config as defaults
    from jpeft.run.workdir import INPUTS

    for folder in (workdir.absolute(), *workdir.absolute().parents):
        if (folder / INPUTS).is_file():
            raise UserError(f"--workdir {workdir}: {folder} holds a run: choose a folder beside it")
    found = []
    for seed, config in itertools.product(seeds, configs):
        given = [f"--config={config}", f"--config.seeds=({seed},)", *shared]
        parsed = command.parse(
            ["jpeft.main", *given], "", {}, "lora,mrpc", lambda: defaults.default("mrpc", "lora"), names=True
        )
        checks.check(parsed.config)
        folder = workdir / f"{parsed.name}_seed_{seed}"
        found.append(Run(parsed.name, seed, folder, (*given, f"--workdir={folder}")))
    names = [run.config for run in found[: len(configs)]]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"--configs: two are called {twice[0]}, and would share a folder: rename one")
    return found


def train(arguments: Sequence[str], folder: str, there: str, cpus: int, gpus: int) -> str:
    """Runs `jpeft.main` in this process, a worker's, so that the run and the lock of its workdir end with the worker.

    Args:
      arguments: of `jpeft.main`.
      folder: the workdir.
      there: where the sweep was started; relative paths mean what they mean there.
      cpus: threads to compute with.
      gpus: how many GPUs Ray shows this worker.

    Returns:
      What went wrong, in one line; "" if the run is finished.

    Raises:
      InterruptedError: if the worker was asked to stop. The run has saved, and is to start again elsewhere.
    """
    os.chdir(there)
    os.environ["PJRT_NPROC"] = str(cpus)  # XLA would take every core
    if not gpus:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Ray leaves all GPUs visible
    Path(folder).mkdir(parents=True, exist_ok=True)
    log = Path(folder, LOG)
    with (
        open(log, "a", buffering=1, encoding="utf-8") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        from jpeft import main

        try:
            code = main.main(["jpeft.main", *arguments])
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
    if not Path(folder, "report.json").is_file():
        raise InterruptedError("the worker was asked to stop")
    return ""


def sweep(todo: Sequence[Run], given: argparse.Namespace) -> dict[Run, str]:
    """Trains all runs on Ray.

    Returns:
      For each run what went wrong, in one line; "" if it is finished.

    Raises:
      UserError: if there is no such cluster, or it has no room for a run.
    """
    import ray

    from jpeft.run.stopping import Stopped, deferred

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = {"include_dashboard": False, "object_store_memory": 10**8} if given.address == "local" else {}
    try:
        ray.init(given.address, log_to_driver=False, logging_level="error", **here)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--address {given.address}: {' '.join(str(error).split()):.200}") from None
    ended: dict[int, str] = {}
    try:
        with deferred() as stopped:  # Ray has put a handler of its own in place, and hands on no exception of ours
            gpus = min(1, _most("GPU")) if given.gpus is None else given.gpus
            _check_room(given.address, {"CPU": given.cpus, "GPU": gpus})
            task = ray.remote(
                num_cpus=given.cpus,
                num_gpus=gpus,
                max_calls=1,  # a process for each run: its memory is free when it ends
                max_retries=given.retries,
                retry_exceptions=[InterruptedError],
            )(train)
            waiting = {
                task.remote(run.arguments, str(run.folder), os.getcwd(), given.cpus, gpus): i
                for i, run in enumerate(todo)
            }
            with _bar(len(todo)) as tell:
                while waiting and not stopped():
                    done, _ = ray.wait(list(waiting), timeout=1)
                    for ref in done:
                        number = waiting.pop(ref)
                        ended[number] = _outcome(ref)
                        tell(todo[number], ended[number])
    finally:
        ray.shutdown()
    if waiting:
        raise Stopped(f"stopped with {len(ended)} of {len(todo)} runs done")
    return {run: ended[i] for i, run in enumerate(todo)}


def _outcome(ref: Any) -> str:
    import ray

    try:
        return ray.get(ref)
    except (ray.exceptions.RayError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Of what the task raised, the last line; of a lost worker, the first.
        return (lines or [type(error).__name__])[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0]


def _most(resource: str) -> int:
    """How much of a resource the largest machine of the cluster has."""
    import ray

    return max((int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]), default=0)


def _check_room(address: str, wanted: Mapping[str, int]) -> None:
    for name, number in wanted.items():
        if number > (most := _most(name)):
            told = f"--{name.lower()}s {number}: no machine has more than {most}"
            if address == "local":
                raise UserError(told)
            print(f"warning: {told} now; waiting for one", file=sys.stderr)  # clusters can grow


@contextlib.contextmanager
def _bar(total: int) -> Any:
    """A bar over all runs, and a line for each that ends."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    columns = TextColumn("  {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar, failed = progress.add_task("runs", total=total), 0

        def tell(run: Run, wrong: str) -> None:
            nonlocal failed
            failed += bool(wrong)
            progress.update(bar, advance=1, description=f"runs, {failed} failed" if failed else "runs")
            console.print(f"{run.config} seed {run.seed}: {'failed' if wrong else 'finished'}", markup=False)

        yield tell


def table(finished: Sequence[Run]) -> str:
    """The table of `jpeft.report`, one row for each config, with the spread over its seeds."""
    from jpeft.core.files import read_record
    from jpeft.report import tables

    rows = []
    for name in dict.fromkeys(run.config for run in finished):
        found = [read_record(run.folder / "report.json", tables.REPORT) for run in finished if run.config == name]
        seeds = [seed for report in found for seed in report["metrics"]["per_seed"]]
        rows.append(
            {
                **found[0],
                "method": name,
                "metrics": {**tables.spread([seed["last"] for seed in seeds]), "per_seed": seeds},
                "parameters": tables.average([report["parameters"] for report in found]),
                "examples_per_second": statistics.fmean(report["examples_per_second"] for report in found),
            }
        )
    return tables.compare(rows)


def run(argv: list[str]) -> None:
    """Parses the command line, trains, and prints the table and the failures."""
    given, shared = arguments(argv[1:])
    if find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install '.[ray]' in the repository, or pip install ray")
    ended = sweep(runs(given.workdir, given.configs, given.seeds, shared), given)
    if finished := [run for run, wrong in ended.items() if not wrong]:
        print(f"\n{table(finished)}", flush=True)
    failed = {run: wrong for run, wrong in ended.items() if wrong}
    for each, wrong in failed.items():
        print(f"failed: {each.config} seed {each.seed}: {wrong} (see {each.folder / LOG})", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> int:
    """Runs the program.

    Returns:
      The exit code: 0, 2 after one line about what the user can mend, or 130 if it was stopped. Where runs failed, it
      exits with 1.
    """
    return command.call(run, argv)


if __name__ == "__main__":
    sys.exit(main())
