"""Several jobs at once on this machine: joblib's worker processes, one job per GPU."""

from __future__ import annotations

from typing import Any

from bench.device import visible_gpus
from bench.errors import UserError
from bench.launchers.calls import Call, Calls


class Processes(Calls):
    """Keeps worker processes warm: a worker loads its libraries and the dense model once."""

    def limits(self) -> dict[str, Any]:
        """Let every job keep its own limits, and take a device where there are any."""
        return {
            "devices": self._devices(),
            "minutes": self.settings.get("timeout_min"),
            "memory_gb": self.settings.get("mem_gb"),
        }

    def carry_out(self, calls: list[Call]) -> None:
        """Run the calls in a pool; one lost worker takes the pool with it, so it is made again.

        What was at work in a pool that broke is tried once more, each alone, so that only the
        culprit fails.
        """
        left = calls
        while left:
            self._pool(left)
            waiting = [call for call in left if not call.has_begun]
            if len(waiting) == len(left):
                break
            left = waiting
        for call in calls:
            if not call.has_ended:
                self._pool([call])

    def _pool(self, calls: list[Call]) -> None:
        """Run the calls in worker processes, even a single one, since it may kill its process."""
        from concurrent.futures import wait

        from joblib.externals.loky import get_reusable_executor

        pool = get_reusable_executor(max_workers=min(self._workers(), len(calls)))
        try:
            wait([pool.submit(_run, call) for call in calls])  # the notes say what came of each
        except BaseException:
            pool.shutdown(wait=False, kill_workers=True)
            raise

    def _workers(self) -> int:
        """Return how many jobs run at once: as asked, else one per device, else two."""
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
        return tuple(map(str, asked))


def _run(call: Call) -> None:
    """Call: a function of a module, which joblib can name in another process."""
    call()
