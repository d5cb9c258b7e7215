"""Launch the runs of `bench run` with Hydra, and collect their records.

Hydra does composition, multirun, sweeping and launching; each of its jobs calls `execute`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench import plugins
from bench.config.overrides import Overrides
from bench.data import hub
from bench.errors import MissingData, RunsFailed, UserError, library_failures_as_errors
from bench.records import Store
from bench.records.files import read_json
from bench.records.record import JsonObject
from bench.runner.execute import execute
from bench.runner.inputs import check_run
from bench.runner.session import host_process_restored
from bench.security import CONFIG_DIR, refuse_shadowed_packages
from bench.sweeps import (
    RunRequest,
    RunResult,
    SweepPlan,
    create_plan,
    existing_sweep,
    job_results,
    perform_job,
    sweep_jobs,
)
from bench.sweeps.job import STUDY_FILE, objective_value
from bench.sweeps.plan import SWEEPS, SweepFingerprint, find_sweep, read_plan
from bench.ui import note, says_notes

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.config.run_config import RunConfig
    from bench.config.sweep_checks import Admitted
    from bench.records import Record
    from bench.runner.session import Session


class Runs(list["Record"]):
    """A list of records that a notebook shows as a table with one row per run."""

    def _repr_html_(self) -> str:
        from bench.records.display import runs_html

        return runs_html(self)


@dataclass
class LaunchOutcome:
    """Outcome of one `bench run`: records in order, and one sentence per failed run."""

    records: list[Record] = field(default_factory=list)
    reused: int = 0
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    study_folder: Path | None = None
    """Folder of a search, which contains its trials."""

    def add(self, result: RunResult) -> None:
        """Add a result; a record shared by several jobs is listed once."""
        if result.warning:
            self.warnings.append(result.warning)
        if result.record.id not in {record.id for record in self.records}:
            self.records.append(result.record)
            self.reused += result.reused


def launch(
    arguments: Sequence[str], session: Session, budget: float | None = None
) -> LaunchOutcome:
    """Check every alternative of the sweep, then let Hydra execute each run.

    A sweep that already exists, with unchanged inputs, is resumed. `budget` is the maximum
    estimated time, in seconds, of the runs to execute.

    Raises:
        UserError: one of the alternatives is wrong, or the runs exceed the budget. No run is
            executed then.
        RunsFailed: no run of the sweep succeeded.
    """
    overrides = Overrides.parse(arguments).without_repeats()
    with host_process_restored():
        # Set first, because libraries read the offline switch only when they are imported.
        if overrides.is_true("offline"):
            hub.go_offline()
        # Looked up before anything is composed, so that resuming or repeating a sweep needs neither
        # the checks nor the libraries that they import.
        results_dir = Path(str(overrides.value("results_dir") or "results"))
        # Found here, because the fingerprint of a sweep includes plug-ins.
        plugins.active()
        has_sweeps = (results_dir / SWEEPS).is_dir() and not overrides.is_true("force")
        known = existing_sweep(results_dir, overrides.arguments) if has_sweeps else None
        if known is not None:
            return _resume_plan(known, session, overrides.texts, budget, reused=True)
        return _launch_new(overrides, session, budget)


def resume_sweep(
    results_dir: Path, sweep: str, session: Session, repeated: Sequence[str] = ()
) -> LaunchOutcome:
    """Run the missing and failed jobs of a sweep; `sweep` is its name or a prefix of it.

    `repeated` are arguments of the plan that the user must allow again, such as `packages`.

    Raises:
        UserError: there is no such sweep, or its plan needs an argument that is not repeated.
    """
    with host_process_restored():
        plan = find_sweep(results_dir.absolute(), sweep)
        return _resume_plan(plan, session, repeated)


def _launch_new(
    overrides: Overrides, session: Session, budget: float | None = None
) -> LaunchOutcome:
    """Check and run what was not launched before."""
    # Imported here: composing needs the libraries that a finished sweep does without.
    from bench.config.sweep_checks import (
        admit,
        alternative_configs,
        check_sweeper,
        refuse_unknown_objective,
    )

    admitted = admit(overrides)
    configs = alternative_configs(overrides, admitted.composed)
    for config in configs:
        refuse_unknown_objective("objective", config.objective, config.benchmark)
    early = check_sweeper(overrides, configs, admitted.composed) if admitted.is_sweep else None
    # An experiment may set it as well.
    if any(config.offline for config in configs):
        hub.go_offline()
    files = [check_run(config, session) for config in configs]
    if early is not None:
        configs, files = [*configs, early], [*files, _check_early_run(early, session)]
    _announce(overrides, admitted, session, budget)
    if not admitted.is_sweep:
        outcome = LaunchOutcome()
        _run_hydra(admitted, session, outcome)
        return outcome
    elsewhere = bool(overrides.setting("hydra.searchpath"))
    inputs = _sweep_fingerprint(configs, files, elsewhere=elsewhere)
    plan = create_plan(configs[0].results_dir, overrides.arguments, inputs)
    try:
        return _run_sweep(plan, admitted, session)
    except UserError:
        # A sweeper or launcher refused its settings. The folder is removed only if no job was
        # planned, because a partial sweep must remain resumable.
        if not sweep_jobs(plan):
            shutil.rmtree(plan.folder)
        raise


def _check_early_run(config: RunConfig, session: Session) -> list[Path] | None:
    """Check the run of a search's early tasks; whatever is wrong with it only, they cause."""
    try:
        return check_run(config, session)
    except MissingData:
        raise
    except UserError as error:
        raise UserError(f"hydra.sweeper.early_tasks: {error}") from error


LINE_SECONDS = 1.0
"""Time limit in seconds for the estimate that is printed before a sweep."""


def _announce(
    overrides: Overrides, admitted: Admitted, session: Session, budget: float | None
) -> None:
    """Print the estimated time of a sweep, and raise if it is above the budget."""
    if budget is None and (not admitted.is_sweep or session.estimator is None or not says_notes()):
        return
    from bench.config.sweep_checks import every_config
    from bench.estimation.words import sweep_line
    from bench.runner.estimate import estimate_configs, refuse_above

    # This machine is measured for a budget, but not for the printed estimate.
    runs = every_config(overrides, admitted)
    # The inputs found for the first run are reused by the run itself; those of others cost time.
    seconds = LINE_SECONDS if budget is None else None
    found = estimate_configs(runs, None, session, estimator=session.estimator, seconds=seconds)
    # Where the estimate stopped before the first run without a record, it says nothing.
    if found.whole or found.to_do:
        note(sweep_line(found))
    if budget is not None:
        refuse_above(budget, found)


def _resume_plan(
    plan: SweepPlan,
    session: Session,
    repeated: Sequence[str],
    budget: float | None = None,
    *,
    reused: bool = False,
) -> LaunchOutcome:
    """Run the missing and failed jobs of a sweep; `reused` counts earlier records as reused.

    `budget` is the maximum estimated time of these jobs in seconds.
    """
    done_before = {job.run for job in sweep_jobs(plan)} if reused else set()
    if not plan.complete or any(job.state != "done" for job in sweep_jobs(plan)):
        Store(plan.results_dir).ensure_writable()
        # Imported here, because a finished sweep is answered without Hydra.
        from bench.config.gate import plan_arguments
        from bench.config.sweep_checks import admit_plan

        # In the sweep's working folder, because a search path may be relative.
        with _working_directory(plan.working_folder):
            admitted = admit_plan(plan.folder, plan.arguments, plan.jobs, repeated)
            if budget is not None:
                planned = plan_arguments(plan.arguments, plan.folder.name)
                _announce(planned, admitted, session, budget)
        outcome = _run_sweep(plan, admitted, session)
    else:
        # Arguments without effect must not be ignored silently.
        if repeated and not reused:
            from bench.config.gate import plan_arguments, refuse_unplanned

            refuse_unplanned(
                plan.folder, plan_arguments(plan.arguments, plan.folder.name), plan.jobs, repeated
            )
        outcome = _sweep_outcome(plan)
    if reused:
        outcome.reused = sum(record.id in done_before for record in outcome.records)
    return outcome


def _run_sweep(plan: SweepPlan, admitted: Admitted, session: Session) -> LaunchOutcome:
    """Let Hydra launch the unfinished jobs of a sweep, and collect the results of all jobs."""
    with _working_directory(plan.working_folder):
        _run_hydra(admitted.in_folder(plan.folder), session, LaunchOutcome())
    # Read again, because the sweeper may have extended the plan on disk.
    return _sweep_outcome(read_plan(plan.folder) or plan)


def _sweep_outcome(plan: SweepPlan) -> LaunchOutcome:
    """Collect the records and failures of a sweep from its status files."""
    outcome = LaunchOutcome()
    if (plan.folder / STUDY_FILE).is_file():
        outcome.study_folder = plan.folder
    for result in job_results(plan):
        if isinstance(result, RunResult):
            outcome.add(result)
        else:
            outcome.failures.append(result)
    trials = _trials(outcome.study_folder / STUDY_FILE) if outcome.study_folder else []
    outcome.failures += _unscored(trials, {record.id for record in outcome.records})
    # If any run succeeded, failures are listed instead of raised. A search may have trials of
    # earlier sweeps.
    succeeded = outcome.records or any(trial["state"] == "complete" for trial in trials)
    if outcome.failures and not succeeded:
        raise RunsFailed(outcome.failures)
    return outcome


def _trials(study: Path) -> list[JsonObject]:
    """Return the trials of a search; none if its file is damaged, which `bench report` names."""
    try:
        trials = cast(Any, read_json(study))["trials"]
        return [trial for trial in trials if {"state", "run", "reason"} <= trial.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _unscored(trials: Sequence[JsonObject], runs: Collection[str]) -> list[str]:
    """Return why trials of these recorded runs have no values: a run may lack an objective."""
    failed = [t["reason"] for t in trials if t["state"] == "fail" and t["run"] in runs]
    # A trial that failed before is repeated under another number.
    return list(dict.fromkeys(map(str, failed)))


def _sweep_fingerprint(
    configs: Sequence[RunConfig], files: Sequence[Sequence[Path] | None], *, elsewhere: bool
) -> SweepFingerprint | None:
    """Fingerprint the inputs of a sweep; None if it must not be answered from its records.

    That is the case if something that is not fingerprinted may change (data on a hub, config files
    `elsewhere`), or if a config, which may be that of an experiment, sets `force`.
    """
    known = [group for group in files if group is not None]
    if len(known) < len(files) or elsewhere or any(config.force for config in configs):
        return None
    kinds = {type(method) for config in configs for method in config.method.values()}
    names = [kind.__module__ for kind in kinds]
    names += [config.model.target for config in configs if config.model.target]
    added = plugins.active()
    packages = {*(name.partition(".")[0] for name in names), *added.packages}
    read = {*(file for group in known for file in group), *added.configs}
    return SweepFingerprint.record_now(read, packages)


def print_hydra_info(arguments: list[str]) -> None:
    """Let Hydra handle its own flags, such as `--cfg job`, without running anything."""
    from bench.config.composition import hydra_errors_as_user_errors
    from bench.config.sweep_checks import admit

    # Flags that name config folders, or a pickled job to run again, are not accepted.
    parser = argparse.ArgumentParser(
        "bench run", add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--package", "-p")
    for flag in ("--resolve", "--hydra-help", "--version"):
        parser.add_argument(flag, action="store_true")
    try:
        asked, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    flags = [
        f"--{name.replace('_', '-')}" if value is True else f"--{name}={value}"
        for name, value in vars(asked).items()
        if value
    ]
    overrides = Overrides.parse(others).without_repeats()
    with host_process_restored(), hydra_errors_as_user_errors(arguments):
        admitted = admit(overrides)
        _run_hydra(admitted, None, LaunchOutcome(), flags)


def _run_hydra(
    admitted: Admitted,
    session: Session | None,
    outcome: LaunchOutcome,
    flags: Sequence[str] = (),
) -> None:
    """Let Hydra compose and launch.

    A single run is added to `outcome`; the jobs of a sweep write status files. Without a `session`
    Hydra only handles its `flags` and runs no job.
    """
    import hydra

    raised: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        assert session is not None
        try:
            return _run_job(composed, session, outcome)
        except Exception as error:
            # Stored and raised below, because Hydra would print its own message.
            raised.append(error)
            return None

    refuse_shadowed_packages()
    enter = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
    with _hydra_arguments([*flags, *admitted.arguments]), _unwrapped_user_errors():
        enter(job)()
    if raised:
        raise raised[0]


@contextmanager
def _unwrapped_user_errors() -> Iterator[None]:
    """Unwrap a `UserError` that a sweeper or launcher of the suite raised when it was created."""
    from hydra.errors import InstantiationException

    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


@contextmanager
def _hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv`, from which Hydra reads its arguments, and restore it afterwards."""
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    # Without it, Hydra prints an abridged traceback and calls sys.exit instead of raising.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    sys.argv = ["bench run", *arguments]
    try:
        yield
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()


@contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    """Change to the folder in which the sweep was started; arguments may be relative paths."""
    before = Path.cwd()
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"the sweep was started in {folder}, which cannot be entered: {error}"
        ) from None
    try:
        yield
    finally:
        os.chdir(before)


def _run_job(composed: DictConfig, session: Session, outcome: LaunchOutcome) -> float | None:
    """Execute one Hydra job, alone or in a sweep, and return the objective of a search."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bench.config.run_config import validated

    def perform(request: RunRequest) -> RunResult:
        with library_failures_as_errors("a library of this run"):
            return execute(validated(composed), request, session)

    settings = HydraConfig.get()
    # Hydra stores overrides of its own config separately. The search path is a part of the run:
    # without it, third-party methods would not be found when the command is repeated.
    task, own = (Overrides.parse(list(settings.overrides[part])) for part in ("task", "hydra"))
    words = [*settings.overrides.task, *own.setting("hydra.searchpath")]
    # The config of a sweep or an experiment may ask for all of its runs, of which this is one.
    is_one = settings.mode == RunMode.MULTIRUN or own.setting("hydra.mode")
    if is_one and (task.setting("sweep") or task.setting("experiment")):
        words.append("hydra.mode=RUN")
    command = shlex.join(["bench", "run", *words])
    if settings.mode == RunMode.MULTIRUN:
        folder = Path(settings.sweep.dir)
        request = RunRequest(command, sweep=folder.name)
        plan = read_plan(folder)
        # Hydra numbers the missing jobs of a resumed sweep from 0; the plan has the original number
        # of a job by its overrides.
        number = plan.number(settings.overrides.task) if plan else None
        number = int(settings.job.num) if number is None else number
        result = perform_job(folder, number, request, lambda: perform(request))
    else:
        result = perform(RunRequest(command))
        outcome.add(result)
    return None if result is None else objective_value(result.record, str(composed.objective))
