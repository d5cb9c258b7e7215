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

from bench.errors import RunsFailed, UserError, unknown
from bench.sweep import Asked, Plan, Result, again, begin, jobs, keep, ran, unfinished
from bench.sweep.inputs import Inputs
from bench.sweep.plan import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from bench.config import RunConfig
    from bench.records import Record


STUDY = "study.json"
FLAGS = ("-m", "--multirun")
Check = Callable[["RunConfig"], "Sequence[Path] | None"]
"""Refuses a run that cannot work; returns the files that decide it, None if a hub may change it."""
Perform = Callable[["RunConfig", Asked], Result]


@dataclass
class Launched:
    """Outcome of one `bench run`: records in order, and one sentence per failed run."""

    records: list[Record] = field(default_factory=list)
    reused: int = 0
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    searched: Path | None = None
    """Folder of a search, with its trials."""

    def add(self, result: Result) -> None:
        """Add a result; a record shared by several jobs is listed once."""
        if result.warning:
            self.warnings.append(result.warning)
        if result.record.id not in {record.id for record in self.records}:
            self.records.append(result.record)
            self.reused += result.reused


def launch(overrides: list[str], check: Check, perform: Perform) -> Launched:
    """Check every alternative of the sweep, then let Hydra pass each run to `perform`.

    A sweep that exists already, and whose inputs are unchanged, is resumed.

    Raises:
        UserError: `check` refused one of them; nothing was run.
        RunsFailed: no run of the sweep succeeded.
    """
    overrides = _flags_first(overrides)
    # Libraries read these variables only once, when they are imported.
    _before_heavy_imports(overrides)
    # Looked up before anything is composed: resuming or repeating a sweep then needs neither the
    # checks nor the libraries they import.
    known = None if "force=true" in overrides else again(_results_dir(overrides), overrides)
    if known is not None:
        return resume(known, perform, reused=True)
    from bench.alternatives import configs, is_sweep

    found = configs(overrides)
    files = [check(config) for config in found]
    if is_sweep(overrides):
        elsewhere = any("hydra.searchpath" in override for override in overrides)
        inputs = _inputs(found, files, elsewhere=elsewhere)
        plan = begin(found[0].results_dir, overrides, inputs)
        try:
            return _sweep(plan, perform)
        except UserError:
            # A sweeper or launcher refused its settings. The folder is removed only if no job was
            # planned: a half-done sweep must stay resumable.
            if not jobs(plan):
                shutil.rmtree(plan.folder)
            raise
    outcome = Launched()
    _enter_hydra(overrides, perform, outcome)
    return outcome


def resume(plan: Plan, perform: Perform, reused: bool = False) -> Launched:
    """Run the missing and failed jobs of a sweep; `reused` counts earlier records as reused."""
    done_before = {job.run for job in jobs(plan)} if reused else set()
    outcome = _sweep(plan, perform) if unfinished(plan) or not plan.complete else _outcome(plan)
    if reused:
        outcome.reused = sum(record.id in done_before for record in outcome.records)
    return outcome


def _sweep(plan: Plan, perform: Perform) -> Launched:
    """Let Hydra launch the unfinished jobs of a sweep, and collect the results of all jobs."""
    with _inside(plan.where):
        overrides = [*plan.asked, f"hydra.sweep.dir={plan.folder}"]
        _enter_hydra(overrides, perform, Launched())
    # The sweeper may have extended the plan on disk meanwhile.
    return _outcome(read(plan.folder) or plan)


def _outcome(plan: Plan) -> Launched:
    """Collect the records and failures of a sweep from its status files."""
    outcome = Launched()
    if (plan.folder / STUDY).is_file():
        outcome.searched = plan.folder
    for came in ran(plan):
        if isinstance(came, Result):
            outcome.add(came)
        else:
            outcome.failures.append(came)
    # A sweep with any record succeeded in part: its failures are listed, not raised.
    if outcome.failures and not outcome.records:
        raise RunsFailed(outcome.failures)
    return outcome


def _inputs(
    configs: list[RunConfig], files: list[Sequence[Path] | None], *, elsewhere: bool
) -> Inputs | None:
    """Fingerprint what decides the sweep; None if something unwatched may change.

    That is data on a hub, or config files `elsewhere`.
    """
    known = [group for group in files if group is not None]
    if len(known) < len(files) or elsewhere:
        return None
    kinds = {type(method) for config in configs for method in config.method.values()}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    return Inputs.of({file for group in known for file in group}, packages)


def _flags_first(overrides: list[str]) -> list[str]:
    """Put flags first, as Hydra's parser requires, so that users may write them anywhere."""
    flags = [given for given in overrides if given.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise unknown("flag", flag, FLAGS)
    return [*flags[:1], *(given for given in overrides if given not in flags)]


def _results_dir(overrides: list[str]) -> Path:
    """Return the results folder named by the arguments, without composing them."""
    given = [o.partition("=")[2] for o in overrides if o.startswith("results_dir=")]
    return Path(given[-1] if given else "results")


def ask_hydra(overrides: list[str]) -> None:
    """Let Hydra answer its own flags, such as `--cfg job`; nothing is run."""
    from bench.compose import plainly

    def never(config: RunConfig, asked: Asked) -> Result:
        raise AssertionError("Hydra runs no job when it is only asked")

    with plainly(overrides):
        _enter_hydra(overrides, never, Launched())


def _before_heavy_imports(overrides: list[str]) -> None:
    """Apply the offline switch before any library reads its environment."""
    if any(override.lower() == "offline=true" for override in overrides):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def _enter_hydra(overrides: list[str], perform: Perform, outcome: Launched) -> None:
    """Let Hydra compose and launch; a single run is added to `outcome`, a sweep leaves notes."""
    import hydra

    from bench.compose import CONFIG_MODULE

    raised: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        try:
            return _job(composed, perform, outcome)
        except Exception as error:
            # Hydra would print its own message first, so the error is carried past it.
            raised.append(error)
            return None

    enter = hydra.main(
        version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config"
    )
    with _arguments(overrides), _in_a_sentence():
        enter(job)()
    if raised:
        raise raised[0]


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Unwrap a `UserError` that a sweeper or launcher of ours raised on construction."""
    from hydra.errors import InstantiationException

    try:
        yield
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


@contextmanager
def _arguments(overrides: list[str]) -> Iterator[None]:
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
def _inside(folder: str) -> Iterator[None]:
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


def _job(composed: DictConfig, perform: Perform, outcome: Launched) -> float | None:
    """Execute one Hydra job, alone or in a sweep, and return the objective of a search."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bench.compose import typed

    about = HydraConfig.get()
    command = shlex.join(["bench", "run", *about.overrides.task])
    if about.mode == RunMode.MULTIRUN:
        folder = Path(about.sweep.dir)
        asked = Asked(command, group=folder.name)
        plan = read(folder)
        # A resumed sweep launches only its missing jobs, which Hydra numbers from 0; the plan knows
        # the original number of a job by its overrides.
        number = plan.number(about.overrides.task) if plan else None
        number = int(about.job.num) if number is None else number
        result = keep(folder, number, asked, lambda: perform(typed(composed), asked))
    else:
        result = perform(typed(composed), Asked(command))
        outcome.add(result)
    return None if result is None else objective(result.record, str(composed.objective))


def objective(record: Record, name: str) -> float | None:
    """Return the number that a search optimises: a task's headline metric, or a cost.

    A benchmark with one task has no `average`; the task's own metric stands for it.
    """
    metric = record.metric(name)
    headlines = [metric for metric in record.metrics if metric.headline]
    if metric is None and name == "average" and len(headlines) == 1:
        metric = headlines[0]
    if metric is not None:
        return metric.value
    found = [cost.value for cost in record.costs if cost.quantity == name]
    return found[0] if found else None
