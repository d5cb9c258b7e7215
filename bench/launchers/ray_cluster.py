"""Jobs as Ray tasks, on a cluster that Ray starts here or on one that is there already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.device import visible_gpus
from bench.errors import UserError
from bench.launchers.calls import Call, Calls
from bench.launchers.engine import engine

GIB = 2**30
STARTS = 3
"""A busy machine may need longer than the 30 s in which Ray expects a node to be up."""


class Ray(Calls):
    """Ray hands out processors, memory and devices, and sets CUDA_VISIBLE_DEVICES for a job."""

    def limits(self) -> dict[str, Any]:
        """Ray has no time limit for a task, so a job keeps its own."""
        return {"minutes": self.settings.get("timeout_min")}

    def carry_out(self, calls: list[Call]) -> None:
        """Send all calls to the cluster and wait until each has come back or is lost."""
        _before_ray_is_imported()
        ray: Any = engine("ray", "ray")
        started = self._connect(ray)
        try:
            run = ray.remote(_run).options(**self._needs())
            for task in [run.remote(call) for call in calls]:
                try:
                    ray.get(task)
                except ray.exceptions.RayError:
                    continue  # a worker, or its machine, is gone; the job's note says so
        finally:
            if started:
                ray.shutdown()

    def _connect(self, ray: Any) -> bool:
        """Join the cluster at `address`, or start one here; return whether it is ours to end."""
        if ray.is_initialized():
            return False
        address = self.settings.get("address")
        local: dict[str, Any] = {}
        if address is None:
            local = {"num_cpus": self.settings.get("num_cpus"), "include_dashboard": False}
        for left in reversed(range(STARTS)):
            try:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"env_vars": _import_path()},
                    **local,
                )
                break
            except Exception as error:  # Ray says a plain Exception when a node is too slow
                ray.shutdown()
                if not left:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"hydra.launcher.address={address}: no Ray cluster: {reason}"
                    ) from None
        return True

    def _needs(self) -> dict[str, Any]:
        """Return what a job needs; Ray starts it where that is free."""
        gpus = self.settings.get("gpus_per_job", "auto")
        if gpus == "auto":
            gpus = 1 if visible_gpus() else 0
        needs = {"num_cpus": self.settings.get("cpus_per_job") or 1, "num_gpus": gpus}
        memory_gb = self.settings.get("mem_gb")
        if memory_gb:
            needs["memory"] = int(memory_gb * GIB)
        # What is lost is started again by `Calls`, which also counts how often.
        return {**needs, "max_retries": 0}


def _before_ray_is_imported() -> None:
    """Set what Ray reads from the environment, unless the user has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A job that asks for no GPU keeps seeing what there is.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _run(call: Call) -> None:
    """Call, in a Ray worker, whose own handling of SIGTERM is left alone."""
    call()


def _import_path() -> dict[str, str]:
    """Let the workers find the packages that this process finds."""
    given = os.environ.get("PYTHONPATH", "")
    here = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join(p for p in (here, given) if p)}
