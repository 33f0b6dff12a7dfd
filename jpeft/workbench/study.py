"""The database of a search: which points were tried, which ones are being tried and by whom, and what they scored.

It is Optuna's journal, a file to which every worker appends. Optuna has no notion of a worker that died, so that is
decided here: whoever runs a trial holds a lock of the operating system on its folder, which ends with the process
however it ends. A trial that is "running" and that nobody holds was left behind, and is taken up by whoever comes next.
Trials are handed out one at a time, under one lock.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from jpeft.core.errors import UserError, one_line
from jpeft.core.tree import flatten
from jpeft.plans.plan import Plan
from jpeft.workbench import sampling
from jpeft.workbench import space as spaces
from jpeft.workbench.locks import alone, hold
from jpeft.workbench.space import Point

__all__ = ["Claim", "Study", "Trial", "begin", "claim", "counted", "fail", "tell", "trials"]

NAME, JOURNAL = "search", "study.journal"
OF, REDRAWN, SECONDS, WHY = "of", "redrawn", "seconds", "why"  # what is kept besides points and values
MOST_DRAWS = 5  # of the sampler for a plan that is new, before one is drawn at random
SHOWN = 4  # differences in a message


class Study(NamedTuple):
    """A database that is open.

    Attributes:
      folder: of the search.
      journal: Optuna's storage.
      study: Optuna's study in it.
      choices: {name: how many} that a point chooses from.
      plan_of: the plan of a point.
      first: points that are tried before any other.
      startup: how many trials are random.
      seed: of the sampler.
    """

    folder: Path
    journal: Any
    study: Any
    choices: Mapping[str, int]
    plan_of: Callable[[Point], Plan]
    first: Sequence[Point]
    startup: int
    seed: int


class Trial(NamedTuple):
    """A point, and what became of it.

    Attributes:
      number: in the order in which they were begun.
      plan: of the point; {} if it has no module, or is not whole: a worker may have died while it was drawn.
      state: "waiting", "running", "complete" or "fail".
      redrawn: whether another point was drawn in its place, because it was none to run.
      values: score and percentage of a complete one.
      seconds: that it took.
      why: it failed.
    """

    number: int
    plan: Plan
    state: str
    redrawn: bool
    values: tuple[float, float] | None
    seconds: float
    why: str


class Claim(NamedTuple):
    """A trial that is this worker's to run, until the lock is closed.

    Attributes:
      number: of the trial.
      plan: to train.
      folder: for its run.
      again: whether it was left behind by another worker, or this one as it was stopped.
      lock: on the folder.
    """

    number: int
    plan: Plan
    folder: Path
    again: bool
    lock: TextIO


def begin(
    folder: Path, of: Mapping[str, Any], choices: Mapping[str, int], plan_of: Callable[[Point], Plan],
    first: Sequence[Point], startup: int, seed: int,
) -> Study:  # fmt: skip
    """Opens the database of a folder, or makes it.

    Args:
      folder: of the search.
      of: what the scores depend on, JSON.
      choices: see `Study`, as are the others.
      plan_of: likewise.
      first: likewise.
      startup: likewise.
      seed: likewise.

    Raises:
      UserError: if there is one of something else, or it is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it has a line for every trial, and so has the program
    path = folder / JOURNAL
    with alone(folder):
        with _readable(folder):
            # Its lock is a link to the path, which it can only tell the age of if that is absolute.
            journal = optuna.storages.JournalStorage(JournalFileBackend(str(path.resolve())))
            study = optuna.create_study(
                storage=journal, study_name=NAME, directions=["maximize", "minimize"], load_if_exists=True
            )
        now = json.loads(json.dumps(of))
        if OF not in study.user_attrs:
            study.set_user_attr(OF, now)
        _check_of(study.user_attrs[OF], now, path)
    return Study(folder, journal, study, choices, plan_of, first, startup, seed)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # what Optuna's reader fails with
        told = f"{one_line(error):.80}"
        raise UserError(
            f"{folder / JOURNAL} is damaged ({told}): if its last line is cut short, delete that line, or choose "
            "another --workdir"
        ) from None


def _check_of(was: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    old, new = ({".".join(names): x for names, x in flatten(each).items()} for each in (was, now))
    differ = [name for name in {**old, **new} if (name in old, old.get(name)) != (name in new, new.get(name))]
    if differ:
        each = [f"{n} was {old.get(n, 'not set')!r:.60}, now {new.get(n, 'not set')!r:.60}" for n in differ[:SHOWN]]
        more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise UserError(f"{path} is of another search ({'; '.join(each)}{more}): choose another --workdir")


def trials(study: Study) -> list[Trial]:
    """All of them, by number.

    Raises:
      UserError: if the file is damaged.
    """
    found = []
    with _readable(study.folder):
        every = study.study.get_trials(deepcopy=False)
    for frozen in every:
        known = frozen.user_attrs
        found.append(
            Trial(
                frozen.number,
                study.plan_of(frozen.params) if set(frozen.params) == set(study.choices) else {},
                frozen.state.name.lower(),
                bool(known.get(REDRAWN)),
                tuple(frozen.values) if frozen.state.name == "COMPLETE" else None,
                known.get(SECONDS, 0.0),
                known.get(WHY, ""),
            )
        )
    return found


def counted(every: Sequence[Trial]) -> list[Trial]:
    """The trials that are one of those asked for: running, complete, or failed in training."""
    return [trial for trial in every if trial.state != "waiting" and not trial.redrawn]


def claim(study: Study, wanted: int) -> Claim | None:
    """A trial for this worker: one that was left behind, or a new one.

    Args:
      study: the database.
      wanted: how many trials there are to be.

    Returns:
      The trial, or None if there are as many as wanted, and those that are not finished are with other workers.
    """
    with alone(study.folder):
        seen: list[Plan] = []
        for trial in trials(study):
            if trial.state == "running":
                if not trial.plan or trial.plan in seen:
                    # Points are drawn in here, so whoever drew this one died before it could draw another.
                    _redraw(study, trial.number)
                elif (lock := hold(_folder(study, trial.plan))) is not None:
                    return Claim(trial.number, trial.plan, _folder(study, trial.plan), True, lock)
            seen.append(trial.plan)
        every = trials(study)
        return _drawn(study, every) if len(counted(every)) < wanted else None


def _drawn(study: Study, every: Sequence[Trial]) -> Claim:
    """A new trial, of a plan that no other has.

    A point without any module is not run: its score is the head's alone, whatever the other coordinates are, and since
    nothing is smaller it would always be on the front, where it draws the sampler to what is nearly nothing. Neither is
    one whose plan was tried. Both are told to Optuna as failed, which its sampler leaves out of account.
    """
    known = {spaces.key(trial.plan) for trial in every if trial.plan}
    waiting = [point for point in study.first if spaces.key(study.plan_of(point)) not in known]
    draw = 0
    while True:
        number = len(every) + draw
        # By the number alone, so that a search that was stopped draws what it would have drawn.
        rng = np.random.default_rng((study.seed, number))
        if waiting:
            study.study.enqueue_trial(dict(waiting.pop(0)))
        elif draw >= MOST_DRAWS:
            study.study.enqueue_trial(sampling.unseen(study.choices, study.plan_of, known, rng))
        study.study.sampler = sampling.sampler(study.startup, int(rng.integers(2**32)))
        asked = study.study.ask(sampling.distributions(study.choices))
        plan = study.plan_of(asked.params)
        if plan and spaces.key(plan) not in known:
            folder = _folder(study, plan)
            lock = hold(folder)
            if lock is None:
                raise UserError(f"{folder} is in use by another search: choose another --workdir")
            return Claim(asked.number, plan, folder, False, lock)
        _redraw(study, asked.number)
        draw += 1


def _folder(study: Study, plan: Plan) -> Path:
    return study.folder / "trials" / spaces.key(plan)


def _redraw(study: Study, number: int) -> None:
    _keep(study, number, REDRAWN, True)
    study.study.tell(number, state=_states().FAIL)


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def _keep(study: Study, number: int, name: str, value: Any) -> None:
    own = study.journal.get_study_id_from_name(NAME)
    study.journal.set_trial_user_attr(study.journal.get_trial_id_from_study_id_trial_number(own, number), name, value)


def tell(study: Study, number: int, score: float, percent: float, seconds: float) -> None:
    """Ends a trial with what it found."""
    _keep(study, number, SECONDS, seconds)
    study.study.tell(number, [score, percent])


def fail(study: Study, number: int, why: str) -> None:
    """Ends a trial that cannot be trained."""
    _keep(study, number, WHY, why)
    study.study.tell(number, state=_states().FAIL)
