"""Parallel jobs on this machine in joblib's worker processes, one job per GPU."""

from __future__ import annotations

from typing import Any

from bench.device.devices import visible_gpus
from bench.errors import UserError
from bench.sweeps.launchers.local import RemoteJob, RetryingLauncher


class JoblibLauncher(RetryingLauncher):
    """Launcher on reused worker processes: each loads its libraries and the dense model once."""

    def limits(self) -> dict[str, Any]:
        """Let every job enforce its own limits, and lock a device if there are any."""
        return {
            "devices": self._devices(),
            "minutes": self.settings.get("timeout_min"),
            "memory_gb": self.settings.get("mem_gb"),
        }

    def run_jobs(self, calls: list[RemoteJob]) -> None:
        """Run the jobs in a pool, which is created again whenever a lost worker breaks it.

        Jobs that were running when a pool broke are tried once more, each alone, so that only the
        one that kills its worker fails.
        """
        # loky breaks the whole pool if one worker dies. Jobs that had not started can run in a new
        # pool; those that had started may include the culprit and are kept for the end.
        left = calls
        while left:
            self._pool(left)
            waiting = [call for call in left if not call.has_started]
            # Not one job started: another pool would break the same way.
            if len(waiting) == len(left):
                break
            left = waiting
        for call in calls:
            if not call.has_ended:
                self._pool([call])

    def _pool(self, calls: list[RemoteJob]) -> None:
        """Run the jobs in worker processes; even a single one, since it may kill its process."""
        from concurrent.futures import wait

        from joblib.externals.loky import get_reusable_executor

        pool = get_reusable_executor(max_workers=min(self._workers(), len(calls)))
        try:
            # Results are not read: the status files hold the outcome of each job.
            wait([pool.submit(_run_job, call) for call in calls])
        except BaseException:  # Ctrl-C: workers would otherwise finish their jobs
            pool.shutdown(wait=False, kill_workers=True)
            raise

    def _workers(self) -> int:
        """Return the number of parallel jobs: as configured, else one per device, else two."""
        asked = self.settings.get("jobs")
        return int(asked) if asked else len(self._devices()) or 2

    def _devices(self) -> tuple[str, ...]:
        asked = self.settings.get("devices", "auto")
        if asked == "auto":
            return tuple(visible_gpus())
        if asked is None or isinstance(asked, str):
            if asked in (None, "none"):
                return ()
            raise UserError(f"hydra.launcher.devices={asked}: allowed: auto, none, or a list")
        # As text: an entry may be an index, a UUID or a MIG device.
        return tuple(map(str, asked))


def _run_job(call: RemoteJob) -> None:
    # A module-level function, which pickles by name.
    call()
