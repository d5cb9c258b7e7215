"""What every launcher of ours shares: calls that can travel, and patience with lost workers.

hydra-joblib-launcher and hydra-submitit-launcher (1.2.0, both of 2022) give a whole sweep up when
one worker is lost, and hydra-ray-launcher (1.2.2) needs cloudpickle < 3, which Ray itself has left
behind; so these are thin launchers around the engines themselves.
"""

from __future__ import annotations

import os
import shlex
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from bench.launch import objective
from bench.records import Store
from bench.sweep.job import forget, read_note, reason, write_note
from bench.sweep.lease import lease
from bench.sweep.limits import limited
from bench.sweep.plan import read
from bench.sweep.state import LOST


@dataclass
class Call:
    """One job, complete in itself: it can be carried to another process and called there."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    singletons: dict[Any, Any]
    overrides: list[str]
    number: int
    where: str
    devices: tuple[str, ...] = ()
    minutes: float | None = None
    memory_gb: float | None = None

    def __call__(self) -> None:
        """Run the job here; how it ended is in its note."""
        os.chdir(self.where)
        lease(self.devices)
        setup_globals()
        Singleton.set_state(self.singletons)
        try:
            loader = self.context.config_loader
            config = loader.load_sweep_config(self.config, list(self.overrides))
        except Exception as error:  # a combination that no alternative alone has shown
            self.fail(reason(error))
            return
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        with limited(self.minutes, self.memory_gb):
            run_job(
                hydra_context=self.context,
                config=config,
                task_function=self.task,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )

    def checkpoint(self) -> Any:
        """Answer submitit when Slurm takes the machine away: the same call, queued again.

        A run keeps what it has finished, so that its second start goes on where this one stops.
        """
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def fail(self, why: str) -> None:
        """Note that the job has failed, for a reason that the job itself could not note."""
        note = read_note(self.folder, self.number) or {}
        command = note.get("command") or shlex.join(["bench", "run", *self.overrides])
        failed = {"number": self.number, "command": command, "state": "failed", "reason": why}
        write_note(self.folder, note | failed)

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir))

    @property
    def has_begun(self) -> bool:
        """Whether any process has started this job."""
        return read_note(self.folder, self.number) is not None

    @property
    def has_ended(self) -> bool:
        """Whether this job is done or has failed for a reason of its own."""
        note = read_note(self.folder, self.number)
        return note is not None and note["state"] in ("done", "failed")


class Calls(Launcher):  # type: ignore[misc]  # Hydra has no types
    """A launcher that starts again, once, what its engine has lost, and then calls it failed."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of the launcher's config; `devices` and limits go to every call."""
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    @abstractmethod
    def carry_out(self, calls: list[Call]) -> None:
        """Run the calls and return when each has ended or is lost; the notes say which."""

    def limits(self) -> dict[str, Any]:
        """Return the fields of `Call` that the engine leaves to the job's own process."""
        return {}

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; nothing is raised for a job that failed or was lost."""
        calls = self._calls(job_overrides, initial_job_idx)
        for call in calls:
            forget(call.folder, call.number)
        self.carry_out(calls)
        lost = [call for call in calls if not call.has_ended]
        if lost:
            self.carry_out(lost)
        for call in lost:
            if not call.has_ended:
                note = read_note(call.folder, call.number) or {}
                call.fail(LOST.format(host=note.get("host", "the machine it was sent to")))
        return [self._returned(call) for call in calls]

    def _returned(self, call: Call) -> JobReturn:
        """Return what other sweepers than ours optimise: the objective of the job's record."""
        note = read_note(call.folder, call.number) or {}
        record = Store(call.folder.parent.parent).find(str(note.get("run")))
        returned = JobReturn(overrides=call.overrides, status=JobStatus.COMPLETED)
        returned.return_value = record and objective(record, str(self.config.objective))
        return returned

    def _calls(self, jobs: Sequence[Sequence[str]], first: int) -> list[Call]:
        """Make the calls, by the numbers that the plan gives the jobs."""
        plan = read(Path(str(self.config.hydra.sweep.dir)))
        limits = self.limits()
        numbers = [plan.number(overrides) if plan else None for overrides in jobs]
        return [
            Call(
                context=self.hydra_context,
                config=self.config,
                task=self.task_function,
                singletons=Singleton.get_state(),
                overrides=list(overrides),
                number=first + place if number is None else number,
                where=str(Path.cwd()),
                **limits,
            )
            for place, (overrides, number) in enumerate(zip(jobs, numbers, strict=True))
        ]


class Here(Calls):
    """One job after the other in this process, which keeps libraries and the dense model."""

    def carry_out(self, calls: list[Call]) -> None:
        """Run the calls in order."""
        for call in calls:
            call()
