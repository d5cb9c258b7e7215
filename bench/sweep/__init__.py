"""Sweeps: their plan, the status of each job, and resuming what is missing."""

from bench.sweep.job import Asked, Result, keep
from bench.sweep.plan import Plan, again, begin
from bench.sweep.state import Job, jobs, ran, unfinished

__all__ = ["Asked", "Job", "Plan", "Result", "again", "begin", "jobs", "keep", "ran", "unfinished"]
