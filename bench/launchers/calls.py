"""Shared base of all launchers: jobs that can be pickled, and a retry for lost workers.

hydra-joblib-launcher and hydra-submitit-launcher (1.2.0, both of 2022) abort a whole sweep when one
worker is lost, and hydra-ray-launcher (1.2.2) needs cloudpickle < 3, which Ray itself no longer
uses. These are therefore thin launchers around joblib, submitit and Ray themselves.
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
    """One self-contained job: it can be pickled, sent to another process and called there."""

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
        """Run the job in this process; its outcome is in its status file."""
        # Relative paths in the overrides refer to the folder where the sweep was started.
        os.chdir(self.where)
        # Before anything can initialise CUDA, which reads CUDA_VISIBLE_DEVICES once.
        lease(self.devices)
        # A fresh process lacks Hydra's resolvers and singletons; the main process sends the latter.
        setup_globals()
        Singleton.set_state(self.singletons)
        try:
            loader = self.context.config_loader
            config = loader.load_sweep_config(self.config, list(self.overrides))
        except Exception as error:  # values that are valid alone may fail in combination
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
        """Return what submitit requeues when Slurm preempts the job: the same job.

        A run keeps what it has finished, so the second start resumes where this one stops.
        """
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def fail(self, why: str) -> None:
        """Record that the job failed for a reason that the job itself could not record."""
        note = read_note(self.folder, self.number) or {}
        command = note.get("command") or shlex.join(["bench", "run", *self.overrides])
        failed = {"number": self.number, "command": command, "state": "failed", "reason": why}
        write_note(self.folder, note | failed)

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir))

    @property
    def has_begun(self) -> bool:
        """Whether any process has started this job."""
        return read_note(self.folder, self.number) is not None

    @property
    def has_ended(self) -> bool:
        """Whether this job is done or has failed by itself, and was not lost."""
        # A lost job still says "running", an interrupted one "waiting".
        note = read_note(self.folder, self.number)
        return note is not None and note["state"] in ("done", "failed")


class Calls(Launcher):  # type: ignore[misc]  # Hydra has no types
    """Launcher that runs lost jobs a second time, and then marks them as failed."""

    def __init__(self, **settings: Any) -> None:
        """Keep the settings of the launcher's config; subclasses document their own."""
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the objects that Hydra passes to a launcher."""
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config

    @abstractmethod
    def carry_out(self, calls: list[Call]) -> None:
        """Run the jobs; return when each has ended or is lost. The status files say which."""

    def limits(self) -> dict[str, Any]:
        """Return device and limit fields of `Call` that the job's own process has to enforce."""
        return {}

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; a job that fails or is lost raises nothing."""
        calls = self._calls(job_overrides, initial_job_idx)
        # Status files of an earlier attempt would make these jobs look ended.
        for call in calls:
            forget(call.folder, call.number)
        self.carry_out(calls)
        lost = [call for call in calls if not call.has_ended]
        if lost:
            self.carry_out(lost)
        # Once only: a job that kills its worker (out of memory, say) would do so for ever.
        for call in lost:
            if not call.has_ended:
                note = read_note(call.folder, call.number) or {}
                call.fail(LOST.format(host=note.get("host", "the machine it was sent to")))
        return [self._returned(call) for call in calls]

    def _returned(self, call: Call) -> JobReturn:
        """Return the objective of the job's record, which foreign sweepers optimise."""
        note = read_note(call.folder, call.number) or {}
        record = Store(call.folder.parent.parent).find(str(note.get("run")))
        # COMPLETED even for a failed job: Hydra raises the error of a FAILED one when the value is
        # read, which would end the sweep.
        returned = JobReturn(overrides=call.overrides, status=JobStatus.COMPLETED)
        returned.return_value = record and objective(record, str(self.config.objective))
        return returned

    def _calls(self, jobs: Sequence[Sequence[str]], first: int) -> list[Call]:
        """Build the jobs, numbered as in the plan."""
        # A resumed sweep launches only what is missing, so the launch index is not the job number.
        # Jobs of a foreign sweeper are not planned and keep the launch index.
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
    """Runs one job after the other in this process, which keeps libraries and the dense model."""

    def carry_out(self, calls: list[Call]) -> None:
        """Run the jobs in order."""
        for call in calls:
            call()
