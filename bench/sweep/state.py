"""How far a sweep is: its plan joined with its jobs' notes and with the records that there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bench.records import Store
from bench.sweep.job import JOBS, Note, Result, is_alive, read_note
from bench.sweep.plan import Plan

State = Literal["waiting", "running", "done", "failed"]
LOST = "its process on {host} ended without a word (killed, out of memory, or preempted)"


@dataclass(frozen=True)
class Job:
    """One job as it is now; `reason` is one sentence, `log` where the details are."""

    number: int
    overrides: tuple[str, ...]
    state: State
    run: str | None = None
    reason: str | None = None
    log: str | None = None
    host: str | None = None


def jobs(plan: Plan) -> list[Job]:
    """Return every job of a sweep in order."""
    store = Store(plan.results_dir)
    numbers = dict(enumerate(plan.jobs))
    for path in (plan.folder / JOBS).glob("[0-9]*.json"):  # of a sweeper that plans as it goes
        numbers.setdefault(int(path.stem), ())
    return [_job(plan, store, number, numbers[number]) for number in sorted(numbers)]


def table(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per job; of what it asks, only what not all jobs ask."""
    states = jobs(plan)
    shared = set.intersection(*(set(job.overrides) for job in states)) if len(states) > 1 else set()
    return [
        {
            "job": job.number,
            "state": job.state,
            "run": job.run,
            "asks": " ".join(given for given in job.overrides if given not in shared),
            "reason": job.reason,
            "log": job.log,
        }
        for job in states
    ]


def unfinished(plan: Plan) -> list[Job]:
    """Return the jobs that wait, failed or were lost, but none that another process works on."""
    return [job for job in jobs(plan) if job.state in ("waiting", "failed")]


def ran(plan: Plan) -> Iterator[Result | str]:
    """Yield what came of each job: its record, or for a failed one what a person has to know."""
    store = Store(plan.results_dir)
    for job in jobs(plan):
        note = read_note(plan.folder, job.number) or {}
        if job.state == "done" and job.run:
            yield Result(store.get(job.run), bool(note.get("reused")), note.get("warning"))
        elif job.state == "failed":
            where = f" (details: {job.log})" if job.log else ""
            asked = note.get("command") or " ".join(job.overrides)
            yield f"{asked}: {job.reason}{where}"


def summary(plan: Plan) -> dict[str, Any]:
    """Return one row about a sweep: how many of its jobs are in which state."""
    states = [job.state for job in jobs(plan)]
    counts = {state: states.count(state) for state in ("waiting", "running", "done", "failed")}
    return {"sweep": plan.name, **counts, "asked": " ".join(plan.asked)}


def _job(plan: Plan, store: Store, number: int, overrides: tuple[str, ...]) -> Job:
    note = read_note(plan.folder, number)
    if note is None:
        return Job(number, overrides, "waiting")
    log, host = note.get("log"), note.get("host")
    known: dict[str, Any] = {"number": number, "overrides": overrides, "log": log, "host": host}
    if note["state"] == "done":
        return _done(store, note, known)
    if note["state"] == "running":
        if is_alive(plan.folder, number):
            return Job(**known, state="running")
        return Job(**known, state="failed", reason=LOST.format(host=host))
    state: State = "failed" if note["state"] == "failed" else "waiting"
    return Job(**known, state=state, reason=note.get("reason"))


def _done(store: Store, note: Note, known: dict[str, Any]) -> Job:
    """A job is done as long as its record is there and can be read."""
    run = str(note.get("run"))
    if (store.folder(run) / "record.json").is_file():
        return Job(**known, state="done", run=run)
    return Job(**known, state="waiting", reason=f"its record {run} is gone")
