"""Jobs as Ray tasks, on a cluster started on this machine or an existing one."""

from __future__ import annotations

import os
from contextlib import suppress
from types import ModuleType

from bench.device.devices import visible_gpus
from bench.errors import UserError, optional_module
from bench.security import INSTALLATION
from bench.sweeps.launchers.local import (
    GIB,
    SAFE_PATH,
    JobLimits,
    RemoteJob,
    RetryingLauncher,
    raise_stopped,
    run_remote_job,
)

START_ATTEMPTS = 3
"""Attempts to start Ray: a busy machine may exceed the 30 s that Ray gives a node to start."""


class RayLauncher(RetryingLauncher):
    """Launcher on Ray, which assigns CPUs, memory and devices, and sets CUDA_VISIBLE_DEVICES."""

    def job_limits(self) -> JobLimits:
        """Return the time limit: Ray has none for tasks, so the job enforces it."""
        return {"time_limit_minutes": self.settings.get("timeout_min")}

    def run_jobs(self, jobs: list[RemoteJob]) -> None:
        """Send all jobs to the cluster and wait until each has ended or is lost."""
        _set_ray_environment()
        ray = optional_module("ray", "ray")
        started = self._connect(ray)
        try:
            run = ray.remote(run_remote_job).options(**self._needs())
            for job, task in [(job, run.remote(job)) for job in jobs]:
                # If the worker or its machine died, the job's status file shows it.
                with suppress(ray.exceptions.RayError):
                    ray.get(task)
                raise_stopped([job])
        finally:
            if started:
                ray.shutdown()

    def _connect(self, ray: ModuleType) -> bool:
        """Join the cluster at `address` or start one; return whether this launcher must end it."""
        if ray.is_initialized():  # a host program's connection must survive the sweep
            return False
        address = self.settings.get("address")
        local: dict[str, object] = {}
        if address is None:
            local = {"num_cpus": self.settings.get("num_cpus"), "include_dashboard": False}
        for left in reversed(range(START_ATTEMPTS)):
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"env_vars": _import_path_variables()},
                    **local,
                )
                break
            except Exception as error:  # Ray raises a plain Exception if a node starts too slowly
                ray.shutdown()
                if not left:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"hydra.launcher.address={address}: no Ray cluster: {reason}"
                    ) from None
        return True

    def _needs(self) -> dict[str, object]:
        """Return the resources of a job; Ray starts it where they are free."""
        gpus = self.settings.get("gpus_per_job", "auto")
        if gpus == "auto":
            gpus = 1 if visible_gpus() else 0
        needs = {"num_cpus": self.settings.get("cpus_per_job") or 1, "num_gpus": gpus}
        memory_gb = self.settings.get("mem_gb")
        if memory_gb:
            needs["memory"] = int(memory_gb * GIB)
        # The base class repeats lost jobs, once; Ray's own retries would come on top of that.
        return {**needs, "max_retries": 0}


def _set_ray_environment() -> None:
    """Set environment variables that Ray reads when it is imported, unless the user has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this, Ray hides all GPUs from a job that requests none (`gpus_per_job: 0`).
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _import_path_variables() -> dict[str, str]:
    """Return a PYTHONPATH with which workers find the packages of this process."""
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (str(INSTALLATION), given) if part)
    return {"PYTHONPATH": path, SAFE_PATH: "1"}
