"""From `bench run` arguments to Hydra's launcher, and from its jobs to records.

Hydra owns composition, multirun, sweepers and launchers; each job comes back to `execute`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench import plugins
from bench.config.overrides import Overrides
from bench.data import hub
from bench.errors import RunsFailed, UserError, library_failures_as_errors
from bench.records import Store
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
    unfinished_jobs,
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
    """A list of records that a notebook shows as one table, a row per run."""

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
    """Folder of a search, with its trials."""

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

    A sweep that exists already, and whose inputs are unchanged, is resumed. `budget` is the most
    seconds that what is to do may take by its estimate.

    Raises:
        UserError: one of the alternatives is wrong, or all exceed the budget; nothing was run.
        RunsFailed: no run of the sweep succeeded.
    """
    overrides = Overrides.parse(arguments).without_repeats()
    with host_process_restored():
        # Libraries read the offline switch only once, when they are imported.
        if overrides.is_true("offline"):
            hub.go_offline()
        # Looked up before anything is composed: resuming or repeating a sweep then needs neither
        # the checks nor the libraries they import.
        results_dir = Path(str(overrides.value("results_dir") or "results"))
        # The state of a sweep covers plug-ins, which are found from here on.
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

    `repeated` are arguments of the plan that a plan cannot allow by itself, such as `packages`.

    Raises:
        UserError: there is no such sweep, or its plan asks for more than is repeated.
    """
    with host_process_restored():
        plan = find_sweep(results_dir.absolute(), sweep)
        Store(results_dir).ensure_writable()
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
    if admitted.is_sweep:
        check_sweeper(overrides, configs, admitted.composed)
    # An experiment may set it as well.
    if any(config.offline for config in configs):
        hub.go_offline()
    files = [check_run(config, session) for config in configs]
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
        # planned: a half-done sweep must stay resumable.
        if not sweep_jobs(plan):
            shutil.rmtree(plan.folder)
        raise


LINE_SECONDS = 1.0
"""Time after which the line before a sweep is about its first runs only."""


def _announce(
    overrides: Overrides, admitted: Admitted, session: Session, budget: float | None
) -> None:
    """Say what a sweep should take, and refuse what is above the budget."""
    if budget is None and (not admitted.is_sweep or session.estimator is None or not says_notes()):
        return
    from bench.config.sweep_checks import every_config
    from bench.estimation.words import sweep_line
    from bench.runner.estimate import estimate_configs, refuse_above

    # A budget is worth measuring this machine for; a line is not.
    runs = every_config(overrides, admitted)
    # What the first run asks is found once and used by the run itself; the others cost extra.
    seconds = LINE_SECONDS if budget is None else None
    found = estimate_configs(runs, None, session, estimator=session.estimator, seconds=seconds)
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

    `budget` is the most seconds that these jobs may take.
    """
    done_before = {job.run for job in sweep_jobs(plan)} if reused else set()
    if unfinished_jobs(plan) or not plan.complete:
        # Imported here: a finished sweep is answered without Hydra.
        from bench.config.gate import plan_arguments
        from bench.config.sweep_checks import admit_plan

        # In its folder, against which a relative search path counts.
        with _working_directory(plan.working_folder):
            admitted = admit_plan(plan.folder, plan.arguments, plan.jobs, repeated)
            if budget is not None:
                planned = plan_arguments(plan.arguments, plan.folder.name)
                _announce(planned, admitted, session, budget)
        outcome = _run_sweep(plan, admitted, session)
    else:
        # What is given for nothing would be taken for done.
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
    # The sweeper may have extended the plan on disk meanwhile.
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
    # A sweep with any record succeeded in part: its failures are listed, not raised.
    if outcome.failures and not outcome.records:
        raise RunsFailed(outcome.failures)
    return outcome


def _sweep_fingerprint(
    configs: Sequence[RunConfig], files: Sequence[Sequence[Path] | None], *, elsewhere: bool
) -> SweepFingerprint | None:
    """Fingerprint what decides the sweep; None if it must not be answered from its records.

    That is because something unwatched may change (data on a hub, config files `elsewhere`), or
    because a config, an experiment's as well, forces its run.
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
    """Let Hydra answer its own flags, such as `--cfg job`; nothing is run."""
    from bench.config.composition import hydra_errors_as_user_errors
    from bench.config.sweep_checks import admit

    # Without the flags that name config folders or a pickled job to run again.
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

    A single run is added to `outcome`; the jobs of a sweep leave status files. Without a `session`
    Hydra only answers a question and runs no job.
    """
    import hydra

    raised: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        assert session is not None
        try:
            return _run_job(composed, session, outcome)
        except Exception as error:
            # Hydra would print its own message first, so the error is carried past it.
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
    """Unwrap a `UserError` that a sweeper or launcher of ours raised on construction."""
    from hydra.errors import InstantiationException

    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


@contextmanager
def _hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Put the arguments on the command line, from which Hydra reads them, and restore it after."""
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    # Otherwise Hydra prints its own abridged traceback and calls sys.exit instead of raising.
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

    from bench.config.composition import validated

    def perform(request: RunRequest) -> RunResult:
        with library_failures_as_errors("a library of this run"):
            return execute(validated(composed), request, session)

    settings = HydraConfig.get()
    # Hydra keeps overrides of its own config apart. The search path belongs to the run: without it
    # a third party's methods would not be found when the command is repeated.
    searched = Overrides.parse(list(settings.overrides.hydra)).setting("hydra.searchpath")
    command = shlex.join(["bench", "run", *settings.overrides.task, *searched])
    if settings.mode == RunMode.MULTIRUN:
        folder = Path(settings.sweep.dir)
        request = RunRequest(command, sweep=folder.name)
        plan = read_plan(folder)
        # A resumed sweep launches only its missing jobs, which Hydra numbers from 0; the plan knows
        # the original number of a job by its overrides.
        number = plan.number(settings.overrides.task) if plan else None
        number = int(settings.job.num) if number is None else number
        result = perform_job(folder, number, request, lambda: perform(request))
    else:
        result = perform(RunRequest(command))
        outcome.add(result)
    return None if result is None else objective_value(result.record, str(composed.objective))
