"""From `bench run` arguments to Hydra's launcher, and from its jobs to records.

Hydra owns composition, multirun, sweepers and launchers; the caller passes the function that
executes a run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import RunsFailed, UserError, unknown_name
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
from bench.sweeps.plan import SweepFingerprint, read_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from bench.config.run_config import RunConfig
    from bench.records import Record

MULTIRUN_FLAGS = ("-m", "--multirun")
CheckRun = Callable[["RunConfig"], "Sequence[Path] | None"]
"""Refuses a run that cannot work; returns the files that decide it, None if a hub may change it."""
ExecuteRun = Callable[["RunConfig", RunRequest], RunResult]


@dataclass
class LaunchOutcome:
    """Outcome of one `bench run`: records in order, and one sentence per failed run."""

    records: list[Record] = field(default_factory=list)
    reused: int = 0
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    searched: Path | None = None
    """Folder of a search, with its trials."""

    def add(self, result: RunResult) -> None:
        """Add a result; a record shared by several jobs is listed once."""
        if result.warning:
            self.warnings.append(result.warning)
        if result.record.id not in {record.id for record in self.records}:
            self.records.append(result.record)
            self.reused += result.reused


def launch(overrides: list[str], check: CheckRun, perform: ExecuteRun) -> LaunchOutcome:
    """Check every alternative of the sweep, then let Hydra pass each run to `perform`.

    A sweep that exists already, and whose inputs are unchanged, is resumed.

    Raises:
        UserError: `check` refused one of them; nothing was run.
        RunsFailed: no run of the sweep succeeded.
    """
    overrides = _flags_first(overrides)
    # Libraries read these variables only once, when they are imported.
    _set_offline_environment(overrides)
    # Looked up before anything is composed: resuming or repeating a sweep then needs neither the
    # checks nor the libraries they import.
    known = (
        None if "force=true" in overrides else existing_sweep(_results_dir(overrides), overrides)
    )
    if known is not None:
        return resume_plan(known, perform, reused=True)
    from bench.config.sweep_checks import alternative_configs, is_sweep

    found = alternative_configs(overrides)
    files = [check(config) for config in found]
    if is_sweep(overrides):
        elsewhere = any("hydra.searchpath" in override for override in overrides)
        inputs = _sweep_fingerprint(found, files, elsewhere=elsewhere)
        plan = create_plan(found[0].results_dir, overrides, inputs)
        try:
            return _run_sweep(plan, perform)
        except UserError:
            # A sweeper or launcher refused its settings. The folder is removed only if no job was
            # planned: a half-done sweep must stay resumable.
            if not sweep_jobs(plan):
                shutil.rmtree(plan.folder)
            raise
    outcome = LaunchOutcome()
    _run_hydra(overrides, perform, outcome)
    return outcome


def resume_plan(plan: SweepPlan, perform: ExecuteRun, reused: bool = False) -> LaunchOutcome:
    """Run the missing and failed jobs of a sweep; `reused` counts earlier records as reused."""
    done_before = {job.run for job in sweep_jobs(plan)} if reused else set()
    outcome = (
        _run_sweep(plan, perform)
        if unfinished_jobs(plan) or not plan.complete
        else _sweep_outcome(plan)
    )
    if reused:
        outcome.reused = sum(record.id in done_before for record in outcome.records)
    return outcome


def _run_sweep(plan: SweepPlan, perform: ExecuteRun) -> LaunchOutcome:
    """Let Hydra launch the unfinished jobs of a sweep, and collect the results of all jobs."""
    with _working_directory(plan.working_folder):
        overrides = [*plan.arguments, f"hydra.sweep.dir={plan.folder}"]
        _run_hydra(overrides, perform, LaunchOutcome())
    # The sweeper may have extended the plan on disk meanwhile.
    return _sweep_outcome(read_plan(plan.folder) or plan)


def _sweep_outcome(plan: SweepPlan) -> LaunchOutcome:
    """Collect the records and failures of a sweep from its status files."""
    outcome = LaunchOutcome()
    if (plan.folder / STUDY_FILE).is_file():
        outcome.searched = plan.folder
    for came in job_results(plan):
        if isinstance(came, RunResult):
            outcome.add(came)
        else:
            outcome.failures.append(came)
    # A sweep with any record succeeded in part: its failures are listed, not raised.
    if outcome.failures and not outcome.records:
        raise RunsFailed(outcome.failures)
    return outcome


def _sweep_fingerprint(
    configs: list[RunConfig], files: list[Sequence[Path] | None], *, elsewhere: bool
) -> SweepFingerprint | None:
    """Fingerprint what decides the sweep; None if something unwatched may change.

    That is data on a hub, or config files `elsewhere`.
    """
    known = [group for group in files if group is not None]
    if len(known) < len(files) or elsewhere:
        return None
    kinds = {type(method) for config in configs for method in config.method.values()}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    return SweepFingerprint.record_now({file for group in known for file in group}, packages)


def _flags_first(overrides: list[str]) -> list[str]:
    """Put flags first, as Hydra's parser requires, so that users may write them anywhere."""
    flags = [given for given in overrides if given.startswith("-")]
    for flag in flags:
        if flag not in MULTIRUN_FLAGS:
            raise unknown_name("flag", flag, MULTIRUN_FLAGS)
    return [*flags[:1], *(given for given in overrides if given not in flags)]


def _results_dir(overrides: list[str]) -> Path:
    """Return the results folder named by the arguments, without composing them."""
    given = [o.partition("=")[2] for o in overrides if o.startswith("results_dir=")]
    return Path(given[-1] if given else "results")


def print_hydra_info(overrides: list[str]) -> None:
    """Let Hydra answer its own flags, such as `--cfg job`; nothing is run."""
    from bench.config.composition import hydra_errors_as_user_errors

    def never(config: RunConfig, asked: RunRequest) -> RunResult:
        raise AssertionError("Hydra runs no job when it is only asked")

    with hydra_errors_as_user_errors(overrides):
        _run_hydra(overrides, never, LaunchOutcome())


def _set_offline_environment(overrides: list[str]) -> None:
    """Apply the offline switch before any library reads its environment."""
    if any(override.lower() == "offline=true" for override in overrides):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def _run_hydra(overrides: list[str], perform: ExecuteRun, outcome: LaunchOutcome) -> None:
    """Let Hydra compose and launch; a single run is added to `outcome`, a sweep leaves notes."""
    import hydra

    raised: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        try:
            return _run_job(composed, perform, outcome)
        except Exception as error:
            # Hydra would print its own message first, so the error is carried past it.
            raised.append(error)
            return None

    refuse_shadowed_packages()
    enter = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
    with _hydra_arguments(overrides), _unwrapped_user_errors():
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
def _hydra_arguments(overrides: list[str]) -> Iterator[None]:
    """Put the overrides on the command line, from which Hydra reads them, and restore it after."""
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    # Otherwise Hydra prints its own abridged traceback and calls sys.exit instead of raising.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    sys.argv = ["bench run", *overrides]
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


def _run_job(composed: DictConfig, perform: ExecuteRun, outcome: LaunchOutcome) -> float | None:
    """Execute one Hydra job, alone or in a sweep, and return the objective of a search."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bench.config.composition import validated

    about = HydraConfig.get()
    command = shlex.join(["bench", "run", *about.overrides.task])
    if about.mode == RunMode.MULTIRUN:
        folder = Path(about.sweep.dir)
        asked = RunRequest(command, sweep=folder.name)
        plan = read_plan(folder)
        # A resumed sweep launches only its missing jobs, which Hydra numbers from 0; the plan knows
        # the original number of a job by its overrides.
        number = plan.number(about.overrides.task) if plan else None
        number = int(about.job.num) if number is None else number
        result = perform_job(folder, number, asked, lambda: perform(validated(composed), asked))
    else:
        result = perform(validated(composed), RunRequest(command))
        outcome.add(result)
    return None if result is None else objective_value(result.record, str(composed.objective))
