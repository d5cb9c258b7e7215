"""Optuna sweeper: asks Optuna for trials, launches them as jobs, and reports their objectives.

The released version of hydra-optuna-sweeper needs Optuna 2, so this uses Optuna's ask-and-tell
interface. Jobs go through Hydra's launcher, so a search runs on Slurm or Ray just like a grid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.errors import UserError
from bench.launch import STUDY, objective
from bench.launchers.engine import engine
from bench.launchers.launching import Launching
from bench.records import Store
from bench.records.atomic import write_bytes
from bench.sweep.early import Standing, is_hopeless
from bench.sweep.job import read_note
from bench.sweep.plan import Plan, read
from bench.sweep.space import distributions

if TYPE_CHECKING:
    from optuna import Study, Trial

    from bench.records import Record

# User attributes of a trial: its result on the early tasks, its run id, why it failed.
EARLY, RUN, REASON = "early", "run", "reason"


class Search(Launching):
    """Searches `space` for Pareto-optimal trade-offs between `objectives`.

    Args:
        study: name; its journal is `results_dir/studies/NAME.log`; an existing study is resumed.
        trials: number of finished trials, pruned ones included.
        parallel: number of trials that are asked for and launched at once.
        seed: seed of Optuna's TPE sampler.
        objectives: such as `maximize average` or `minimize flops`: a task or a cost quantity.
        space: range per key in Hydra's sweep syntax: `interval(0.1,0.7)`, `range(2,9)`,
            `choice(a,b)`; `tag(log,interval(...))` samples logarithmically.
        early: tasks to score first; dominated trials stop there.
        margin: standard errors by which a trial must be behind to be stopped.
    """

    def __init__(
        self, study: str, trials: int, parallel: int, seed: int, objectives: list[str],
        space: dict[str, str], early: list[str], margin: float,
    ) -> None:  # fmt: skip
        self.name, self.trials, self.parallel, self.seed = study, trials, parallel, seed
        self.objectives = _directions(objectives)
        self.space, self.early, self.margin = dict(space), list(early), margin

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has `trials` of them, then write its results."""
        # Fails before any work if Optuna is not installed.
        engine("optuna", "search")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        ranges = [f"{key}={values}" for key, values in self.space.items()]
        # A key given on the command line replaces its range of the config.
        given = {text.partition("=")[0] for text in arguments}
        ranges = [text for text in ranges if text.partition("=")[0] not in given]
        space, fixed = distributions(parser.parse_overrides([*ranges, *arguments]))
        folder = Path(self.config.hydra.sweep.dir)
        journal = folder.parent.parent / "studies" / f"{self.name}.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            # One process per study: requeueing takes every RUNNING trial for one of a dead process.
            with FileLock(journal.with_suffix(".lock"), blocking=False):
                study = self._study(journal)
                self._go_on(study, folder, space, fixed)
        except Timeout:
            raise UserError(
                f"hydra.sweeper.study={self.name} is in use by another process: "
                "wait for it, or choose another name"
            ) from None
        _write(study, self.objectives, folder)
        plan = read(folder)
        if plan is not None:
            plan.with_jobs([], complete=True)

    def _study(self, journal: Path) -> Study:
        """Open or create the study; Optuna's journal is append-only text and survives a crash."""
        optuna: Any = engine("optuna", "search")
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=self.name,
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            directions=list(self.objectives.values()),
            load_if_exists=True,
        )
        # Optuna stores the directions only: values of different quantities would be mixed silently.
        if study.user_attrs.get("objectives", self.objectives) != self.objectives:
            raise UserError(
                f"hydra.sweeper.study={self.name} exists with different objectives "
                f"({study.user_attrs['objectives']}): choose another name"
            )
        study.set_user_attr("objectives", self.objectives)
        _take_up(study)
        return study

    def _go_on(self, study: Study, folder: Path, space: dict[str, Any], fixed: list[str]) -> None:
        left = self.trials - len(_ended(study))
        # Failed trials count as asked here, but not as ended: the next resume asks for them again,
        # while this loop is guaranteed to stop.
        while left > 0:
            asked = [study.ask(space) for _ in range(min(self.parallel, left))]
            left -= len(asked)
            jobs = {t.number: [*fixed, *(f"{k}={v}" for k, v in t.params.items())] for t in asked}
            promising = self._after_early_tasks(study, folder, asked, jobs)
            records = self._launch(folder, [jobs[trial.number] for trial in promising])
            for trial, came in zip(promising, records, strict=True):
                self._tell(study, trial, came)
            # After every batch, so that an interrupted search can be inspected.
            _write(study, self.objectives, folder)

    def _after_early_tasks(
        self, study: Study, folder: Path, asked: list[Trial], jobs: dict[int, list[str]]
    ) -> list[Trial]:
        """Score the early tasks of the trials and return those that are not dominated."""
        if not self.early:
            return asked
        short = [f"benchmark.tasks=[{','.join(self.early)}]"]
        # Perplexity is scored next to the tasks and would make the short run long.
        if "perplexity" in self.config.benchmark:
            short.append("~benchmark.perplexity")
        standings: dict[int, Standing] = {}
        for trial, came in zip(
            asked, self._launch(folder, [[*jobs[t.number], *short] for t in asked]), strict=True
        ):
            if isinstance(came, str):
                self._tell(study, trial, came)
                continue
            standings[trial.number] = Standing.of(came, self._costs(came))
            trial.set_user_attr(EARLY, standings[trial.number].as_list())
        rivals = [Standing.read(t.user_attrs[EARLY]) for t in _completed(study)
                  if EARLY in t.user_attrs]  # fmt: skip
        # Trials of the same batch compete as well; otherwise the first batch could stop none.
        rivals += standings.values()
        promising = []
        for trial in asked:
            mine = standings.get(trial.number)
            if mine is not None and is_hopeless(mine, rivals, self.margin):
                _prune(study, trial)
            elif mine is not None:
                promising.append(trial)
        return promising

    def _costs(self, record: Record) -> tuple[float, ...]:
        small = [name for name, direction in self.objectives.items() if direction == "minimize"]
        return tuple(value for name in small if (value := objective(record, name)) is not None)

    def _launch(self, folder: Path, jobs: list[list[str]]) -> list[Record | str]:
        """Run jobs; return the record of each, or the reason why there is none."""
        if not jobs:
            return []
        plan = (read(folder) or Plan(folder, (), str(Path.cwd()), "")).with_jobs(
            jobs, complete=False
        )
        self.launcher.launch(jobs, initial_job_idx=len(plan.jobs) - len(jobs))
        store = Store(folder.parent.parent)
        came: list[Record | str] = []
        for job in jobs:
            number = plan.number(job)
            note = read_note(folder, number) if number is not None else None
            record = store.find(note["run"]) if note and note["state"] == "done" else None
            came.append(record or (note or {}).get("reason", "it never started"))
        return came

    def _tell(self, study: Study, trial: Trial, came: Record | str) -> None:
        """Report the objectives of a trial to Optuna, or its failure."""
        from optuna.trial import TrialState

        if isinstance(came, str):
            trial.set_user_attr(REASON, came)
            study.tell(trial, state=TrialState.FAIL)
            return
        values = [objective(came, name) for name in self.objectives]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            missing = list(self.objectives)[values.index(None)]
            trial.set_user_attr(REASON, f"run {came.id} has no {missing}")
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(RUN, came.id)
        study.tell(trial, known)


def _directions(objectives: list[str]) -> dict[str, str]:
    """Parse texts such as `maximize average` into {average: maximize}, in order."""
    found = {}
    for text in objectives:
        direction, _, name = str(text).partition(" ")
        if direction not in ("maximize", "minimize") or not name.strip():
            raise UserError(
                f"hydra.sweeper.objectives={text!r}: allowed: `maximize NAME`, `minimize NAME`"
            )
        found[name.strip()] = direction
    if not found:
        raise UserError("hydra.sweeper.objectives is empty: set it to [maximize average], say")
    return found


def _take_up(study: Study) -> None:
    """Requeue trials that a killed process left running, and failed ones."""
    from optuna.trial import TrialState

    ended = [trial.params for trial in _ended(study)]
    again: list[dict[str, Any]] = []
    # A trial cannot return from FAIL, so its parameters are enqueued as a new one, once each,
    # unless a repetition has ended or is waiting already.
    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.params and trial.params not in (*ended, *again):
            again.append(trial.params)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
    for params in again:
        if params not in queued:
            study.enqueue_trial(params)


def _ended(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return list(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _completed(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return list(study.get_trials(states=(TrialState.COMPLETE,)))


def _prune(study: Study, trial: Trial) -> None:
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.PRUNED)


def _write(study: Study, objectives: dict[str, str], folder: Path) -> None:
    """Write all trials, with the Pareto-optimal ones marked, for reports and plots."""
    front = {trial.number for trial in study.best_trials} if _completed(study) else set()
    trials = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "values": trial.values,
            "params": trial.params,
            "run": trial.user_attrs.get(RUN),
            "reason": trial.user_attrs.get(REASON),
            "front": trial.number in front,
        }
        for trial in study.trials
    ]
    text = json.dumps({"study": study.study_name, "objectives": objectives, "trials": trials})
    write_bytes(folder / STUDY, text.encode())
