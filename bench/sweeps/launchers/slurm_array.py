"""Jobs through submitit: as one Slurm array, or as processes of this machine."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from bench.device.devices import visible_gpus
from bench.errors import UserError, optional_module
from bench.sweeps.launchers.local import JobLimits, RemoteJob, RetryingLauncher, raise_stopped

if TYPE_CHECKING:
    from submitit import Executor, Job

# Settings that are not passed on to submitit under the same name.
OWN_SETTINGS = {"cluster", "parallel", "max_num_timeout", "mem_gb"}

# Parameters that submitit's AutoExecutor names alike on every cluster; all others get the prefix
# `slurm_`.
SHARED_SETTINGS = {
    "name", "timeout_min", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node",
    "stderr_to_stdout",
}  # fmt: skip
MAX_PARALLEL = 256


class SubmititLauncher(RetryingLauncher):
    """Launcher that submits every job separately, with its own log, time limit and memory.

    Slurm announces a preemption or the time limit with SIGUSR2 (`signal_delay_s` earlier; the
    environment variable SUBMITIT_PREEMPT_SIGNAL selects another signal). submitit then requeues the
    job, which resumes from what it has finished.
    """

    @property
    def uses_slurm(self) -> bool:
        """Whether jobs go to Slurm instead of processes of this machine."""
        return bool(self.settings["cluster"] == "slurm")

    def job_limits(self) -> JobLimits:
        """Return memory limit and devices for local processes; Slurm enforces its own."""
        # submitit's local executor enforces `timeout_min` itself, but neither memory nor devices.
        if self.uses_slurm:
            return {}
        return {"devices": tuple(visible_gpus()), "memory_gb": self.settings.get("mem_gb")}

    def run_jobs(self, jobs: list[RemoteJob]) -> None:
        """Submit the jobs and wait for all of them, whether they succeed or not."""
        # submitit replaces %j by the job id, so that every job has its own log folder.
        executor = self._executor(jobs[0].folder / "submitit" / "%j")
        at_once = len(jobs)
        if not self.uses_slurm:  # Slurm has a queue, a single machine has none
            at_once = int(self.settings.get("parallel") or len(visible_gpus()) or 2)
        waiting = iter(jobs)
        while batch := list(islice(waiting, at_once)):
            # One batch becomes one Slurm array: a single sbatch call, whatever the number of jobs.
            with executor.batch():
                submitted = [executor.submit(job) for job in batch]
            self._wait(submitted)
            raise_stopped(batch)

    def _wait(self, jobs: list[Job]) -> None:
        """Wait for all jobs; on an interruption cancel local ones and leave Slurm's queued."""
        try:
            # `wait`, not `result`: the latter would raise the error of a failed job.
            for job in jobs:
                job.wait()
        except BaseException:
            if not self.uses_slurm:
                for job in jobs:
                    job.cancel()
            raise

    def _executor(self, folder: Path) -> Executor:
        submitit = optional_module("submitit", "slurm")
        timeouts = int(self.settings.get("max_num_timeout", 3))
        given = {
            k: _without_config_nodes(v)
            for k, v in self.settings.items()
            if k not in OWN_SETTINGS and v is not None
        }
        if not self.uses_slurm:
            executor = submitit.LocalExecutor(folder=folder, max_num_timeout=timeouts)
            executor.update_parameters(**given)
            return executor
        try:
            executor = submitit.AutoExecutor(
                folder=folder, cluster="slurm", slurm_max_num_timeout=timeouts
            )
        except RuntimeError as error:  # there is no sbatch
            raise UserError(f"hydra/launcher=slurm: {error}") from None
        if self.settings.get("mem_gb"):
            given["mem_gb"] = self.settings["mem_gb"]
        given["array_parallelism"] = self.settings.get("parallel") or MAX_PARALLEL
        known = SHARED_SETTINGS | {"mem_gb"}
        executor.update_parameters(
            **{k if k in known else f"slurm_{k}": value for k, value in given.items()}
        )
        return executor


def _without_config_nodes(value: object) -> object:
    # submitit expects plain lists and dicts, not OmegaConf's nodes.
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
