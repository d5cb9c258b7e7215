"""Parallel jobs on this machine in joblib's worker processes, one job per GPU."""

from __future__ import annotations

from bench.device.devices import visible_gpus
from bench.errors import UserError
from bench.sweeps.launchers.local import (
    JobLimits,
    RemoteJob,
    RetryingLauncher,
    raise_stopped,
    run_remote_job,
)


class JoblibLauncher(RetryingLauncher):
    """Launcher on reused worker processes: each loads its libraries and the dense model once."""

    def job_limits(self) -> JobLimits:
        """Let every job enforce its own limits, and lock a device if there are any."""
        return {
            "devices": self._devices(),
            "time_limit_minutes": self.settings.get("timeout_min"),
            "memory_gb": self.settings.get("mem_gb"),
        }

    def run_jobs(self, jobs: list[RemoteJob]) -> None:
        """Run the jobs in a pool, which is created again whenever a lost worker breaks it.

        Jobs that were running when a pool broke are tried once more, each alone, so that only the
        one that kills its worker fails.
        """
        # loky breaks the whole pool if one worker dies. Jobs that had not started can run in a new
        # pool; those that had started may include the culprit and are kept for the end.
        remaining = jobs
        while remaining:
            self._run_in_pool(remaining)
            waiting = [job for job in remaining if not job.has_started]
            # Not one job started: another pool would break the same way.
            if len(waiting) == len(remaining):
                break
            remaining = waiting
        for job in jobs:
            if not job.has_ended:
                self._run_in_pool([job])

    def _run_in_pool(self, jobs: list[RemoteJob]) -> None:
        """Run the jobs in worker processes; even a single one, since it may kill its process."""
        from concurrent.futures import FIRST_EXCEPTION, wait

        from joblib.externals.loky import get_reusable_executor

        pool = get_reusable_executor(max_workers=min(self._workers(), len(jobs)))
        try:
            # Results are not read: the status files hold the outcome of each job.
            futures = [pool.submit(run_remote_job, job) for job in jobs]
            wait(futures, return_when=FIRST_EXCEPTION)
            # Before the other jobs meet the same full disk.
            raise_stopped(jobs)
            wait(futures)
        except BaseException:  # Ctrl-C: workers would otherwise finish their jobs
            pool.shutdown(wait=True, kill_workers=True)
            raise

    def _workers(self) -> int:
        """Return the number of parallel jobs: as configured, else one per device, else two."""
        configured = self.settings.get("jobs")
        return int(configured) if configured else len(self._devices()) or 2

    def _devices(self) -> tuple[str, ...]:
        configured = self.settings.get("devices", "auto")
        if configured == "auto":
            return tuple(visible_gpus())
        if configured is None or isinstance(configured, str):
            if configured in (None, "none"):
                return ()
            raise UserError(
                f"hydra.launcher.devices={configured}: allowed: auto, none, or a list such as [0,2]"
            )
        # As text: an entry may be an index, a UUID or a MIG device.
        return tuple(map(str, configured))
