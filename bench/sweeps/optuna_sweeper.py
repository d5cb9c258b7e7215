"""Optuna sweeper: asks Optuna for trials, launches them as jobs, and reports their objectives.

The released version of hydra-optuna-sweeper needs Optuna 2, so this uses Optuna's ask-and-tell
interface. Jobs go through Hydra's launcher, so a search runs on Slurm or Ray just like a grid.

A trial may be stopped after a few early tasks. Optuna's pruners support a single objective only.
With several objectives, a trial is stopped if another trial costs no more and is clearly better on
the same early tasks: by `early_margin` standard errors of the difference.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.config.overrides import range_numbers
from bench.errors import UserError, optional_module
from bench.records import Store
from bench.records.files import write_bytes
from bench.security import redact
from bench.sweeps.grid_sweeper import LaunchingSweeper
from bench.sweeps.job import STUDY_FILE, objective_value, read_status
from bench.sweeps.plan import plan_in, read_plan

if TYPE_CHECKING:
    from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
    from omegaconf import DictConfig
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from bench.records import Record

Distributions: TypeAlias = "dict[str, BaseDistribution]"
# User attributes of a trial: its result on the early tasks, its run id, the reason of a failure.
EARLY_ATTRIBUTE, RUN_ATTRIBUTE, REASON_ATTRIBUTE = "early", "run", "reason"


class OptunaSweeper(LaunchingSweeper):
    """Searches `space` for Pareto-optimal trade-offs between `objectives`.

    Args:
        study: name; its journal is `results_dir/studies/NAME.log`; an existing study is resumed.
        trials: number of finished trials, pruned ones included.
        parallel: number of trials that are proposed and launched at once.
        seed: seed of Optuna's TPE sampler; the number of earlier trials is added to it. None, as
            in Optuna, draws a different one each time.
        objectives: such as `maximize average` or `minimize flops`: a task or a cost quantity.
        space: range per key in Hydra's sweep syntax: `interval(0.1,0.7)`, `range(2,9)`,
            `choice(a,b)`; `tag(log,interval(...))` samples logarithmically.
        early_tasks: tasks to score first; dominated trials stop there.
        early_margin: standard errors by which a trial must be behind to be stopped.
    """

    def __init__(
        self, study: str, trials: int, parallel: int, seed: int | None, objectives: list[str],
        space: dict[str, str], early_tasks: Sequence[str], early_margin: float,
    ) -> None:  # fmt: skip
        whole_numbers = {"trials": (trials, 1), "parallel": (parallel, 1), "seed": (seed, 0)}
        for key, (number, least) in whole_numbers.items():
            if key == "seed" and number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise UserError(
                    f"hydra.sweeper.{key}={number}: a whole number from {least} on is needed"
                )
        # The name becomes that of a file, which must be in the folder of studies.
        if not isinstance(study, str) or not study or "/" in study or study.startswith("."):
            raise UserError(f"hydra.sweeper.study={study!r}: a name without slashes is needed")
        if not isinstance(early_margin, int | float) or not 0 <= early_margin < math.inf:
            # With NaN, no trial would ever be stopped.
            raise UserError(f"hydra.sweeper.early_margin={early_margin}: 0 or more is needed")
        listed = isinstance(early_tasks, Sequence) and not isinstance(early_tasks, str)
        if not listed or not all(isinstance(name, str) for name in early_tasks):
            raise UserError(f"hydra.sweeper.early_tasks={early_tasks}: a list of names is needed")
        if not isinstance(space, Mapping):
            raise UserError(f"hydra.sweeper.space={space}: ranges by key are needed, or {{}}")
        self.name, self.trials, self.parallel, self.seed = study, trials, parallel, seed
        self.objectives = _directions(objectives or [])
        self.space, self.early_tasks = dict(space), list(early_tasks)
        self.early_margin = early_margin

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until the study has `trials` of them, then write its results."""
        # Fails before any work if Optuna is not installed.
        optional_module("optuna", "search")
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        ranges = [f"{key}={values}" for key, values in self.space.items()]
        # A key on the command line replaces its range in the config.
        given = {text.partition("=")[0] for text in arguments}
        ranges = [text for text in ranges if text.partition("=")[0] not in given]
        space, fixed = optuna_distributions(parser.parse_overrides([*ranges, *arguments]))
        folder = Path(self.config.hydra.sweep.dir)
        journal = folder.parent.parent / "studies" / f"{self.name}.log"
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            # One process per study, because requeueing treats every RUNNING trial as interrupted.
            with FileLock(journal.with_suffix(".lock"), blocking=False):
                study = self._study(journal, fixed, space)
                self._run_trials(study, folder, space, fixed)
        except Timeout:
            raise UserError(
                f"hydra.sweeper.study={self.name} is in use by another process: "
                "wait for it, or choose another name"
            ) from None
        _write_study(study, self.objectives, folder)
        plan = read_plan(folder)
        if plan is not None:
            plan.with_jobs([], complete=True)

    def _study(self, journal: Path, fixed: list[str], space: Distributions) -> Study:
        """Open or create the study; Optuna's journal is append-only text and survives a crash."""
        optuna = optional_module("optuna", "search")
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=self.name,
            directions=list(self.objectives.values()),
            load_if_exists=True,
        )
        # Samplers are not stored. With only the seed, a resumed study would draw the values of its
        # first trials again.
        seed = None if self.seed is None else self.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        # Optuna stores only the directions, so values of different quantities would be mixed.
        if study.user_attrs.get("objectives", self.objectives) != self.objectives:
            raise UserError(
                f"hydra.sweeper.study={self.name} exists with different objectives "
                f"({study.user_attrs['objectives']}): choose another name"
            )
        study.set_user_attr("objectives", self.objectives)
        # Overrides must match too, because scores of different questions or models have no front.
        shared = sorted(text for text in fixed if re.split("[.=]", text)[0] not in _NEUTRAL_KEYS)
        before = study.user_attrs.get("shared", shared)
        if before != shared:
            found = " ".join(sorted({*before} ^ {*shared}))
            raise UserError(
                f"hydra.sweeper.study={self.name} exists with other overrides, whose numbers "
                f"cannot be compared with these (different: {found}): choose another name"
            )
        study.set_user_attr("shared", shared)
        _requeue_interrupted(study, space)
        return study

    def _run_trials(
        self, study: Study, folder: Path, space: Distributions, fixed: list[str]
    ) -> None:
        remaining = self.trials - len(_ended_trials(study))
        # Failed trials count as proposed here, but not as ended: the next resume repeats them,
        # while this loop is guaranteed to stop.
        while remaining > 0:
            trials = [_asked(study, space) for _ in range(min(self.parallel, remaining))]
            remaining -= len(trials)
            jobs = {t.number: [*fixed, *_trial_overrides(t, space)] for t in trials}
            promising = self._drop_hopeless(study, folder, trials, jobs)
            outcomes = self._launch(folder, [jobs[trial.number] for trial in promising])
            for trial, outcome in zip(promising, outcomes, strict=True):
                self._tell(study, trial, outcome)
            # After every batch, so that an interrupted search can be inspected.
            _write_study(study, self.objectives, folder)

    def _drop_hopeless(
        self, study: Study, folder: Path, trials: list[Trial], jobs: dict[int, list[str]]
    ) -> list[Trial]:
        """Score the early tasks of the trials and return those that are not dominated."""
        if not self.early_tasks:
            return trials
        short = self.early_overrides(self.config)
        results: dict[int, EarlyResult] = {}
        outcomes = self._launch(folder, [[*jobs[t.number], *short] for t in trials])
        for trial, outcome in zip(trials, outcomes, strict=True):
            if isinstance(outcome, str):
                self._tell(study, trial, outcome)
                continue
            results[trial.number] = EarlyResult.from_record(outcome, self._costs(outcome))
            trial.set_user_attr(EARLY_ATTRIBUTE, results[trial.number].to_json())
        stored = [trial.user_attrs.get(EARLY_ATTRIBUTE) for trial in _completed_trials(study)]
        rivals = [EarlyResult.from_json(values) for values in stored if values is not None]
        # Trials of the same batch compete as well, or the first batch could not stop any.
        rivals += results.values()
        promising = []
        for trial in trials:
            mine = results.get(trial.number)
            if mine is not None and is_dominated(mine, rivals, self.early_margin):
                _prune(study, trial)
            elif mine is not None:
                promising.append(trial)
        return promising

    def early_overrides(self, config: DictConfig) -> list[str]:
        """Return the overrides of a trial's early run; `config` is that of the search."""
        short = [f"benchmark.tasks=[{','.join(self.early_tasks)}]"]
        # Perplexity is scored beside the tasks and would make the short run long.
        if "perplexity" in config.benchmark:
            short.append("~benchmark.perplexity")
        return short

    def _costs(self, record: Record) -> tuple[float, ...]:
        small = [name for name, direction in self.objectives.items() if direction == "minimize"]
        values = [objective_value(record, name) for name in small]
        # One value per objective, so that all trials can be compared. A missing value counts as
        # infinite, so that the trial does not stop any other.
        return tuple(math.inf if value is None else value for value in values)

    def _launch(self, folder: Path, jobs: list[list[str]]) -> list[Record | str]:
        """Run jobs; return the record of each, or the reason why there is none."""
        if not jobs:
            return []
        plan = plan_in(folder).with_jobs(jobs, complete=False)
        self.launcher.launch(jobs, initial_job_idx=len(plan.jobs) - len(jobs))
        store = Store(folder.parent.parent)
        outcomes: list[Record | str] = []
        for job in jobs:
            number = plan.number(job)
            status = read_status(folder, number) if number is not None else None
            record = store.find(status["run"]) if status and status["state"] == "done" else None
            outcomes.append(record or (status or {}).get("reason", "it never started"))
        return outcomes

    def _tell(self, study: Study, trial: Trial, outcome: Record | str) -> None:
        """Report the objectives of a trial to Optuna, or its failure."""
        from optuna.trial import TrialState

        if isinstance(outcome, str):
            trial.set_user_attr(REASON_ATTRIBUTE, outcome)
            study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_user_attr(RUN_ATTRIBUTE, outcome.id)
        values = [objective_value(outcome, name) for name in self.objectives]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            missing = list(self.objectives)[values.index(None)]
            trial.set_user_attr(REASON_ATTRIBUTE, f"run {outcome.id} has no {missing}")
            study.tell(trial, state=TrialState.FAIL)
            return
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
        if name.strip() in found:
            raise UserError(f"hydra.sweeper.objectives names {name.strip()} twice: give it once")
        found[name.strip()] = direction
    if not found:
        raise UserError(
            "hydra.sweeper.objectives is empty: set it, for example to [maximize average]"
        )
    return found


_NEUTRAL_KEYS = ("results_dir", "tracker", "threads", "offline", "force", "keep_weights")
"""Keys that do not affect a trial's numbers."""


def _asked(study: Study, space: Distributions) -> Trial:
    """Return a new trial; raise `UserError` if the study has another kind of range for a key."""
    try:
        return study.ask(space)
    except ValueError as error:
        raise UserError(
            f"hydra.sweeper.study={study.study_name} exists with another kind of range for one of "
            f"{', '.join(space)} ({error}): choose another name"
        ) from None


def _requeue_interrupted(study: Study, space: Distributions) -> None:
    """Requeue trials that a killed process left running, and failed ones, if still in range."""
    from optuna.trial import TrialState

    ended = [trial.params for trial in _ended_trials(study)]
    again: list[dict[str, object]] = []
    # A trial cannot return from FAIL, so its parameters are enqueued as a new one, once each,
    # unless a repetition has ended or is already waiting.
    for trial in study.get_trials(states=(TrialState.RUNNING, TrialState.FAIL)):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        inside = all(_contains(space[key], v) for key, v in trial.params.items() if key in space)
        if trial.params and inside and trial.params not in (*ended, *again):
            again.append(trial.params)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
    for params in again:
        if params not in queued:
            study.enqueue_trial(params)


def _contains(range_: BaseDistribution, value: Any) -> bool:
    choices = getattr(range_, "choices", None)
    return bool(range_.low <= value <= range_.high if choices is None else value in choices)


def _ended_trials(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def _completed_trials(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _prune(study: Study, trial: Trial) -> None:
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.PRUNED)


def _write_study(study: Study, objectives: dict[str, str], folder: Path) -> None:
    """Write all trials, with the Pareto-optimal ones marked, for reports and plots."""
    front = {trial.number for trial in study.best_trials} if _completed_trials(study) else set()
    trials = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "values": trial.values,
            "params": trial.params,
            "run": trial.user_attrs.get(RUN_ATTRIBUTE),
            "reason": trial.user_attrs.get(REASON_ATTRIBUTE),
            "front": trial.number in front,
        }
        for trial in study.trials
    ]
    text = json.dumps({"study": study.study_name, "objectives": objectives, "trials": trials})
    # Parameters and reasons may contain tokens, and a results folder is shared.
    write_bytes(folder / STUDY_FILE, redact(text).encode())


def optuna_distributions(overrides: Iterable[Override]) -> tuple[Distributions, list[str]]:
    """Return a distribution per swept key, and the remaining overrides unchanged.

    Raises:
        UserError: no key is swept, or a range is empty or invalid.
    """
    from hydra.core.override_parser.types import ValueType
    from optuna.distributions import CategoricalDistribution

    space: Distributions = {}
    fixed: list[str] = []
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif override.value_type == ValueType.INTERVAL_SWEEP:
            space[key] = _interval_distribution(key, override.value())
        elif override.value_type == ValueType.RANGE_SWEEP:
            space[key] = _range_distribution(key, override.value())
        else:
            choices = [str(value) for value in override.sweep_string_iterator()]
            space[key] = CategoricalDistribution(choices)
    if not space:
        raise UserError("a search needs a range: set hydra.sweeper.space.KEY='interval(0.1,0.7)'")
    return space, fixed


def _trial_overrides(trial: Trial, space: Distributions) -> list[str]:
    """Return the overrides of a trial; a value from a range is a decimal, as in a grid."""
    return [f"{key}={_decimal(value, space.get(key))}" for key, value in trial.params.items()]


def _decimal(value: object, distribution: BaseDistribution | None) -> object:
    """Undo the float arithmetic of Optuna's steps: 0.1 plus two steps of 0.1 is 0.3."""
    from optuna.distributions import FloatDistribution

    if not isinstance(distribution, FloatDistribution) or distribution.step is None:
        return value
    start, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    return float(start + round((Decimal(str(value)) - start) / step) * step)


def _interval_distribution(key: str, interval: IntervalSweep) -> BaseDistribution:
    # Hydra's intervals are of real numbers; integers are searched with `range`.
    from optuna.distributions import FloatDistribution

    low, high = interval.start, interval.end
    try:
        return FloatDistribution(low, high, log="log" in interval.tags)
    except ValueError as error:
        raise UserError(f"{key}=interval({low},{high}): {error}") from None


def _range_distribution(key: str, values: RangeSweep) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    # The end is exclusive as in Python, but Optuna's bounds are inclusive: pass the last value.
    numbers = range_numbers(values)
    if not numbers:
        raise UserError(f"{key}: the range is empty")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(numbers[0], numbers[-1], step=int(values.step))
    return FloatDistribution(numbers[0], numbers[-1], step=float(values.step))


@dataclass(frozen=True)
class EarlyResult:
    """A trial after its early tasks: mean accuracy, its standard error, and costs to minimise."""

    accuracy: float
    error: float
    costs: tuple[float, ...]

    @classmethod
    def from_record(cls, record: Record, costs: tuple[float, ...]) -> EarlyResult:
        """Read the record of the early tasks; without any score the accuracy is 0."""
        # A benchmark of one task has no average, which its headline metric replaces.
        average = record.metric("average")
        metric = average or next((m for m in record.metrics if m.headline), None)
        value = metric.value if metric and metric.value is not None else 0.0
        return cls(value, (metric.stderr or 0.0) if metric else 0.0, costs)

    def to_json(self) -> list[float]:
        """Return the values as a JSON list, the inverse of `from_json`."""
        return [self.accuracy, self.error, *self.costs]

    @classmethod
    def from_json(cls, values: list[float]) -> EarlyResult:
        """Return the result for values from `to_json`."""
        accuracy, error, *costs = values
        return cls(accuracy, error, tuple(costs))


def is_dominated(mine: EarlyResult, rivals: Iterable[EarlyResult], margin: float) -> bool:
    """Return whether a rival costs no more and is better by more than `margin` errors."""
    return any(_dominates(rival, mine, margin) for rival in rivals)


def _dominates(rival: EarlyResult, mine: EarlyResult, margin: float) -> bool:
    # Both accuracies are estimates, so their errors add in quadrature. Both are on the same items,
    # whose correlation makes this bound conservative. `lead > 0` prevents a trial from dominating
    # itself when errors are 0.
    cheaper = all(a <= b for a, b in zip(rival.costs, mine.costs, strict=True))
    lead = rival.accuracy - mine.accuracy
    return cheaper and lead > 0 and lead > margin * math.hypot(rival.error, mine.error)
