"""From `bench run` arguments to Hydra's launcher, and from its jobs to records.

Hydra owns composition, multirun, sweepers and launchers; what a run is, the caller says.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import RunsFailed
from bench.sweep import Asked, Result, collect, keep

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from bench.config import RunConfig
    from bench.records import Record


Check = Callable[["RunConfig"], None]
Perform = Callable[["RunConfig", Asked], Result]


@dataclass
class Launched:
    """What came of one `bench run`: records in order, and one sentence per failed run."""

    records: list[Record] = field(default_factory=list)
    reused: int = 0
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Take in one result; a record that several jobs share is listed once."""
        if result.warning:
            self.warnings.append(result.warning)
        if result.record.id not in {record.id for record in self.records}:
            self.records.append(result.record)
            self.reused += result.reused


def launch(overrides: list[str], check: Check, perform: Perform) -> Launched:
    """Check every alternative of the sweep, then let Hydra hand each run to `perform`.

    Raises:
        UserError: `check` refused one of them; nothing was run.
        RunsFailed: no run of the sweep succeeded.
    """
    _before_heavy_imports(overrides)
    from bench.compose import alternatives, run_config

    configs = [run_config(single) for single in alternatives(overrides)]
    for config in configs:
        check(config)
    folder = _sweep_folder(configs[0])
    outcome = Launched()
    _enter_hydra([*overrides, f"hydra.sweep.dir={folder}"], perform, outcome)
    for result in collect(folder, outcome.failures):
        outcome.add(result)
    if outcome.failures and not outcome.records:
        raise RunsFailed(outcome.failures)
    return outcome


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


def _sweep_folder(config: RunConfig) -> Path:
    """Name the folder of a sweep; its name is the group that the sweep's records share."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    return (config.results_dir / "sweeps" / stamp).absolute()


def _enter_hydra(overrides: list[str], perform: Perform, outcome: Launched) -> None:
    """Let Hydra compose and launch; a single run goes into `outcome`, a sweep leaves notes."""
    import hydra

    from bench.compose import CONFIG_MODULE

    raised: list[Exception] = []

    def job(composed: DictConfig) -> float | None:
        try:
            return _job(composed, perform, outcome)
        except Exception as error:  # Hydra would print a line of its own before it raises it
            raised.append(error)
            return None

    enter = hydra.main(
        version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config"
    )
    with _arguments(overrides):
        enter(job)()
    if raised:
        raise raised[0]


@contextmanager
def _arguments(overrides: list[str]) -> Iterator[None]:
    """Hand the overrides to Hydra, which reads the command line, and restore everything after."""
    from hydra.core.global_hydra import GlobalHydra

    before = sys.argv
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    GlobalHydra.instance().clear()
    sys.argv = ["bench run", *overrides]
    try:
        yield
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()


def _job(composed: DictConfig, perform: Perform, outcome: Launched) -> float | None:
    """Carry out one Hydra job, alone or in a sweep, and return what a search optimises."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from bench.compose import typed

    about = HydraConfig.get()
    command = shlex.join(["bench", "run", *about.overrides.task])
    if about.mode == RunMode.MULTIRUN:
        folder = Path(about.sweep.dir)
        asked = Asked(command, group=folder.name)
        result = keep(folder, int(about.job.num), asked, lambda: perform(typed(composed), asked))
    else:
        result = perform(typed(composed), Asked(command))
        outcome.add(result)
    return None if result is None else objective(result.record, str(composed.objective))


def objective(record: Record, name: str) -> float | None:
    """Return the number that a search optimises: a task's headline metric, or a cost."""
    metric = record.metric(name)
    if metric is not None:
        return metric.value
    found = [cost.value for cost in record.costs if cost.quantity == name]
    return found[0] if found else None
