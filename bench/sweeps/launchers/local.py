"""In-process launcher, and what all launchers share: jobs that can be pickled, a retry, limits.

hydra-joblib-launcher and hydra-submitit-launcher (1.2.0, both of 2022) abort a whole sweep when one
worker is lost, and hydra-ray-launcher (1.2.2) needs cloudpickle < 3, which Ray itself no longer
uses. These are therefore thin launchers around joblib, submitit and Ray themselves.

A worker process locks one GPU of its machine until it ends. The lock is a file in the machine's
temporary folder, so that two sweeps on one machine never share a device, and the kernel releases it
however the process ends. Slurm and Ray assign devices themselves and do not need this.
"""

from __future__ import annotations

import getpass
import os
import resource
import shlex
import signal
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from filelock import FileLock, Timeout
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from bench import plugins
from bench.errors import REQUEUED, Stopped
from bench.records import Store
from bench.sweeps.job import (
    clear_status,
    failure_reason,
    is_running,
    objective_value,
    read_status,
    write_status,
)
from bench.sweeps.plan import read_plan
from bench.sweeps.status import LOST_WORKER

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

SAFE_PATH = "PYTHONSAFEPATH"


@contextmanager
def safe_import_path() -> Iterator[None]:
    """Keep the working folder off the import path of Python processes started in the block."""
    # joblib and submitit start workers with `python -m`, which puts the working folder first on
    # sys.path: a stranger's `bench.py` or `joblib.py` there would be imported.
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


@dataclass
class RemoteJob:
    """One self-contained job: it can be pickled, sent to another process and called there."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    singletons: dict[type, object]
    overrides: list[str]
    number: int
    working_folder: str
    devices: tuple[str, ...] = ()
    time_limit_minutes: float | None = None
    memory_gb: float | None = None
    project: str | None = field(default_factory=plugins.project_in_use)

    def __call__(self) -> None:
        """Run the job in this process; its outcome is in its status file."""
        # Relative paths in the overrides refer to the folder where the sweep was started.
        os.chdir(self.working_folder)
        # The consent was found where the sweep was started; another machine need not have it.
        if self.project is not None:
            os.environ[plugins.PROJECT_VARIABLE] = self.project
        plugins.active()
        # Before anything can initialise CUDA, which reads CUDA_VISIBLE_DEVICES once.
        lease_device(self.devices)
        # A fresh process lacks Hydra's resolvers and singletons; the main process sends the latter.
        setup_globals()
        Singleton.set_state(self.singletons)
        try:
            loader = self.context.config_loader
            config = loader.load_sweep_config(self.config, list(self.overrides))
        except Exception as error:  # values that are valid alone may fail in combination
            self.mark_failed(failure_reason(error))
            return
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        with resource_limits(self.time_limit_minutes, self.memory_gb):
            run_job(
                hydra_context=self.context,
                config=config,
                task_function=self.task,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )

    def checkpoint(self) -> DelayedSubmission:
        """Return what submitit requeues when Slurm preempts the job: the same job.

        A run keeps what it has finished, so the second start resumes where this one stops.
        """
        import submitit

        # submitit ends this process next, which is no failure of the run.
        REQUEUED.set()
        return submitit.helpers.DelayedSubmission(self)

    def mark_failed(self, reason: str) -> None:
        """Record that the job failed for a reason that the job itself could not record."""
        status = read_status(self.folder, self.number) or {}
        command = status.get("command") or shlex.join(["bench", "run", *self.overrides])
        failed = {"number": self.number, "command": command, "state": "failed", "reason": reason}
        write_status(self.folder, status | failed)

    def mark_interrupted(self) -> None:
        """Record that the job waits again, if its process was ended before it could do so."""
        status = read_status(self.folder, self.number)
        # Slurm's jobs go on without the command.
        if status and status["state"] == "running" and not is_running(self.folder, self.number):
            with suppress(OSError):
                write_status(self.folder, status | {"state": "waiting", "reason": "interrupted"})

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir))

    @property
    def has_started(self) -> bool:
        """Whether any process has started this job."""
        return read_status(self.folder, self.number) is not None

    @property
    def has_ended(self) -> bool:
        """Whether this job is done or has failed by itself, and was not lost."""
        # A lost job still says "running", an interrupted one "waiting".
        status = read_status(self.folder, self.number)
        return status is not None and status["state"] in ("done", "failed")


def raise_stopped(jobs: Sequence[RemoteJob]) -> None:
    """Raise `Stopped` if one of the jobs was stopped by what would stop the others as well."""
    for job in jobs:
        status = read_status(job.folder, job.number) or {}
        if status.get("state") == "waiting" and status.get("stopped"):
            raise Stopped(str(status.get("reason")))


class JobLimits(TypedDict, total=False):
    """Fields of `RemoteJob` that limit a job; what is left out has no limit."""

    devices: tuple[str, ...]
    time_limit_minutes: float | None
    memory_gb: float | None


class RetryingLauncher(Launcher):  # type: ignore[misc]  # Hydra has no types
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
    def run_jobs(self, jobs: list[RemoteJob]) -> None:
        """Run the jobs; return when each has ended or is lost. The status files say which."""

    def job_limits(self) -> JobLimits:
        """Return the devices and limits that the job's own process has to enforce."""
        return JobLimits()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; a job that fails or is lost raises nothing."""
        jobs = self._make_jobs(job_overrides, initial_job_idx)
        # Status files of an earlier attempt would make these jobs look ended.
        for job in jobs:
            clear_status(job.folder, job.number)
        try:
            with safe_import_path():
                self.run_jobs(jobs)
                raise_stopped(jobs)
                lost = [job for job in jobs if not job.has_ended]
                if lost:
                    self.run_jobs(lost)
        except BaseException:  # Ctrl-C, a full disk
            for job in jobs:
                job.mark_interrupted()
            raise
        # Once only: a job that kills its worker (out of memory, for example) would do so for ever.
        for job in lost:
            if not job.has_ended:
                status = read_status(job.folder, job.number) or {}
                host = status.get("host", "the machine it was sent to")
                job.mark_failed(LOST_WORKER.format(host=host))
        return [self._job_return(job) for job in jobs]

    def _job_return(self, job: RemoteJob) -> JobReturn:
        """Return the objective of the job's record, which foreign sweepers optimise."""
        status = read_status(job.folder, job.number) or {}
        record = Store(job.folder.parent.parent).find(str(status.get("run")))
        # COMPLETED even for a failed job: Hydra raises the error of a FAILED one when the value is
        # read, which would end the sweep.
        returned = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
        returned.return_value = record and objective_value(record, str(self.config.objective))
        return returned

    def _make_jobs(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[RemoteJob]:
        """Build the jobs, numbered as in the plan."""
        # A resumed sweep launches only what is missing, so the launch index is not the job number.
        # Jobs of a foreign sweeper are not planned and keep the launch index.
        plan = read_plan(Path(str(self.config.hydra.sweep.dir)))
        limits = self.job_limits()
        numbers = [plan.number(overrides) if plan else None for overrides in job_overrides]
        return [
            RemoteJob(
                context=self.hydra_context,
                config=self.config,
                task=self.task_function,
                singletons=Singleton.get_state(),
                overrides=list(overrides),
                number=first + place if number is None else number,
                working_folder=str(Path.cwd()),
                **limits,
            )
            for place, (overrides, number) in enumerate(zip(job_overrides, numbers, strict=True))
        ]


class LocalLauncher(RetryingLauncher):
    """Runs one job after the other in this process, which keeps libraries and the dense model."""

    def run_jobs(self, jobs: list[RemoteJob]) -> None:
        """Run the jobs in order."""
        for job in jobs:
            job()


def run_remote_job(job: RemoteJob) -> None:
    """Run a job in a worker process; a function of a module pickles by name."""
    # Not the command's entry point: a worker's own handler of SIGTERM stays in place.
    job()


_HELD_LOCKS: list[FileLock] = []
POLL_SECONDS = 0.5


def lease_device(devices: Sequence[str]) -> str | None:
    """Lock the first free one of `devices`, waiting if necessary, and hide all others.

    Must be called before CUDA is initialised in this process. Returns the device, or None if
    `devices` is empty. A process that already holds a device keeps it.
    """
    if not devices:
        return None
    if _HELD_LOCKS:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    # One folder per user, readable by that user only: in a shared /tmp another user's files could
    # not be locked. Devices are therefore not protected against other users.
    folder = Path(tempfile.gettempdir()) / f"slimbench-devices-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for device in devices:
            lock = FileLock(folder / f"{device.replace('/', '_')}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            # The module keeps a reference, or the lock would be released when it is collected.
            _HELD_LOCKS.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        time.sleep(POLL_SECONDS)


GIB = 2**30


class JobTimeoutError(Exception):
    """A job ran longer than its launcher allows."""


@contextmanager
def resource_limits(minutes: float | None, memory_gb: float | None) -> Iterator[None]:
    """Raise `JobTimeoutError` after `minutes` in the block, and MemoryError beyond `memory_gb`.

    The memory limit covers private allocations of the process, not mapped files or device memory.
    Must be entered in the main thread, where Python delivers signals.
    """

    def expire(signum: int, frame: FrameType | None) -> NoReturn:
        raise JobTimeoutError(f"the job ran longer than its limit of {minutes:g} minutes")

    # RLIMIT_DATA instead of RLIMIT_AS: the address space includes mapped weights and what CUDA
    # reserves, far beyond the memory in use.
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.getsignal(signal.SIGALRM)
    try:
        if memory_gb is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * GIB), hard))
        if minutes is not None:
            signal.signal(signal.SIGALRM, expire)
            signal.setitimer(signal.ITIMER_REAL, minutes * 60)
        yield
    finally:
        if minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # None: a library installed the handler from C, and Python can neither return it nor
            # put it back. The default is the nearest.
            signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
