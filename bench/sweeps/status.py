"""Status of a sweep: its plan joined with the status files of its jobs and with the records."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bench.records import Store
from bench.sweeps.job import JOBS, RunResult, StatusDict, is_running, read_status
from bench.sweeps.plan import SweepPlan
from bench.ui import note

JobState = Literal["waiting", "running", "done", "failed"]
POLL_SECONDS = 0.5
LOST_WORKER = "the worker on {host} died (killed, out of memory, or preempted)"


@dataclass(frozen=True)
class SweepJob:
    """Current state of one job; `reason` is one sentence, `log` the path of the details."""

    number: int
    overrides: tuple[str, ...]
    state: JobState
    run: str | None = None
    reason: str | None = None
    log: str | None = None
    host: str | None = None
    recorded_before: bool = False
    """Whether it is waiting because its record was removed."""
    lost: bool = False
    """Whether it is failed because its process died."""


def sweep_jobs(plan: SweepPlan) -> list[SweepJob]:
    """Return every job of a sweep in order."""
    store = Store(plan.results_dir)
    numbers = dict(enumerate(plan.jobs))
    # A foreign sweeper runs jobs that are not in the plan, but have status files.
    for path in (plan.folder / JOBS).glob("[0-9]*.json"):
        if re.fullmatch("[0-9]{5,9}", path.stem):
            numbers.setdefault(int(path.stem), ())
    return [_read_job(plan, store, number, numbers[number]) for number in sorted(numbers)]


def job_rows(plan: SweepPlan) -> list[dict[str, object]]:
    """Return one row per job, with only those overrides that not all jobs share."""
    states = sweep_jobs(plan)
    shared = set.intersection(*(set(job.overrides) for job in states)) if len(states) > 1 else set()
    return [
        {
            "job": job.number,
            "state": job.state,
            "run": job.run,
            "overrides": " ".join(given for given in job.overrides if given not in shared),
            "reason": job.reason,
            "log": job.log,
        }
        for job in states
    ]


def unfinished_jobs(plan: SweepPlan) -> list[SweepJob]:
    """Return the jobs that are waiting, failed or lost, but none that is running elsewhere."""
    return [job for job in sweep_jobs(plan) if job.state in ("waiting", "failed")]


def left_by_others(plan: SweepPlan) -> list[SweepJob]:
    """Wait for the jobs that other processes are running; return those that they do not end."""
    others = [job.number for job in sweep_jobs(plan) if job.state == "running"]
    if others:
        numbers = ", ".join(map(str, others))
        note(f"another process runs jobs of sweep {plan.name} ({numbers}): waiting for them")
    while any(is_running(plan.folder, number) for number in others):
        time.sleep(POLL_SECONDS)
    # A job that failed there is not tried again.
    return [
        job
        for job in sweep_jobs(plan)
        if job.number in others and (job.state == "waiting" or job.lost)
    ]


def job_results(plan: SweepPlan) -> Iterator[RunResult | str]:
    """Yield each job's record or an error summary; skip jobs that another process runs."""
    store = Store(plan.results_dir)
    for job in sweep_jobs(plan):
        note = read_status(plan.folder, job.number) or {}
        if job.state == "done" and job.run:
            record = store.find(job.run)
            if record is None:
                reason = store.unreadable.get(job.run, "it no longer exists")
                yield f"run {job.run} cannot be read: {reason}; move it away and resume the sweep"
                continue
            yield RunResult(record, bool(note.get("reused")), note.get("warning"))
        # A waiting job was left out by a launcher, or its record was removed. It is reported, so
        # that the sweep does not look complete.
        elif job.state in ("failed", "waiting"):
            log = f" (details: {job.log})" if job.log else ""
            command = note.get("command") or " ".join(job.overrides)
            waits = "was not run; run the same command to resume"
            yield f"{command}: {job.reason or waits}{log}"


def sweep_summary(plan: SweepPlan) -> dict[str, object]:
    """Return one row about a sweep with the number of its jobs per state."""
    states = [job.state for job in sweep_jobs(plan)]
    counts = {state: states.count(state) for state in ("waiting", "running", "done", "failed")}
    return {"sweep": plan.name, **counts, "arguments": " ".join(plan.arguments)}


def _read_job(plan: SweepPlan, store: Store, number: int, overrides: tuple[str, ...]) -> SweepJob:
    note = read_status(plan.folder, number)
    if note is None:
        return SweepJob(number, overrides, "waiting")
    log, host = note.get("log"), note.get("host")
    known: StatusDict = {"number": number, "overrides": overrides, "log": log, "host": host}
    if note["state"] == "done":
        return _finished_job(store, note, known)
    # A killed process also leaves "running" behind; only the lock distinguishes the two.
    if note["state"] == "running":
        if is_running(plan.folder, number):
            return SweepJob(**known, state="running")
        return SweepJob(**known, state="failed", reason=LOST_WORKER.format(host=host), lost=True)
    state: JobState = "failed" if note["state"] == "failed" else "waiting"
    return SweepJob(**known, state=state, reason=note.get("reason"))


def _finished_job(store: Store, note: StatusDict, known: StatusDict) -> SweepJob:
    # A job is done only while its record exists; if it is deleted, `resume` runs the job again.
    run = str(note.get("run"))
    try:
        recorded = (store.folder(run) / "record.json").is_file()
    except OSError:  # It exists, but may not be read.
        recorded = True
    if recorded:
        return SweepJob(**known, state="done", run=run)
    reason = f"its record {run} no longer exists"
    return SweepJob(**known, state="waiting", reason=reason, recorded_before=True)
