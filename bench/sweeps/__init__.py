"""Sweeps: their plan, the status of each job, and resuming jobs that are missing."""

from bench.sweeps.job import RunRequest, RunResult, perform_job
from bench.sweeps.plan import SweepPlan, create_plan, existing_sweep
from bench.sweeps.status import SweepJob, job_results, sweep_jobs, unfinished_jobs

__all__ = [
    "RunRequest",
    "RunResult",
    "SweepJob",
    "SweepPlan",
    "create_plan",
    "existing_sweep",
    "job_results",
    "perform_job",
    "sweep_jobs",
    "unfinished_jobs",
]
