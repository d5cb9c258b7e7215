"""One job of a sweep, run under a lock, with a small status file; and the objective of a search.

A failing job never stops the others, and its outcome is the same whether a launcher runs it in this
process or on another machine. The lock distinguishes a running job from one whose process has died,
because the kernel releases it however the process ends.
"""

from __future__ import annotations

import json
import os
import platform
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter

# Below Python 3.12, pydantic requires this TypedDict.
from typing_extensions import TypedDict

from bench.errors import Stopped, UserError, error_sentence
from bench.records.files import disk_errors_as_stopped, file_locked, read_json, write_bytes
from bench.records.record import utc_now
from bench.security import redact
from bench.ui import note

if TYPE_CHECKING:
    from bench.records import Record

JOBS = "jobs"
StatusDict = dict[str, Any]
_RunId = Annotated[str, Field(pattern=r"^\w[\w-]*$")]


class _StoredStatus(TypedDict, total=False):
    """Fields that are read from a status file; the others are for people."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]  # pydantic's own way
    state: Required[Literal["running", "done", "failed", "waiting"]]
    run: _RunId | None
    reused: bool
    stopped: bool
    command: str
    host: str
    reason: str | None
    log: str | None
    warning: str | None


_STATUS = TypeAdapter(_StoredStatus)


@dataclass(frozen=True)
class RunRequest:
    """A requested run: the command that repeats it, and its sweep."""

    command: str
    sweep: str | None = None


@dataclass(frozen=True)
class RunResult:
    """A record, whether it existed before (`reused`), and the tracker's warning."""

    record: Record
    reused: bool
    warning: str | None = None


def perform_job(
    folder: Path, number: int, request: RunRequest, perform: Callable[[], RunResult]
) -> RunResult | None:
    """Run one job and store its status below `folder`; a failure is recorded instead of raised.

    A second process with the same job waits for the first and then finds its record. An
    interruption is not a failure of the job: it is recorded as `waiting` and raised.
    """
    status: StatusDict = {"number": number, "command": request.command, "state": "running"}
    status |= {"host": platform.node(), "pid": os.getpid(), "started": utc_now()}
    result = None
    path = _status_path(folder, number)

    def report_wait() -> None:
        note(f"another process runs job {number} of sweep {folder.name}: waiting for it")

    # A full disk fails every job, so it stops the sweep instead of this job. A status that could
    # not be written counts as lost, and resuming the sweep runs the job again.
    with (
        disk_errors_as_stopped(folder.parent.parent),
        file_locked(path.with_suffix(".lock"), report_wait),
    ):
        write_status(folder, status)
        try:
            result = perform()
            status |= {"state": "done", "run": result.record.id, "reused": result.reused}
            status |= {"warning": result.warning}
        except Exception as error:  # No failure of a job may stop the sweep.
            status |= {"state": "failed", "reason": failure_reason(error)}
            # A UserError needs no traceback, because its message is sufficient.
            if not isinstance(error, UserError):
                status["log"] = str(_write_traceback(path, error))
        except BaseException as error:
            stopped = isinstance(error, Stopped)
            status |= {"state": "waiting", "reason": str(error) if stopped else "interrupted"}
            status |= {"stopped": stopped, "finished": utc_now()}
            # If a full disk interrupted the run, this write fails as well.
            with suppress(OSError):
                write_status(folder, status)
            raise
        write_status(folder, {**status, "finished": utc_now()})
    return result


def write_status(folder: Path, status: StatusDict) -> None:
    """Write the status of a job atomically."""
    # Commands and error messages may contain tokens, and status files are shared.
    text = redact(json.dumps(status, indent=1))
    write_bytes(_status_path(folder, status["number"]), (text + "\n").encode())


def read_status(folder: Path, number: int) -> StatusDict | None:
    """Return the status of a job, or None if it has not started or the file is damaged."""
    try:
        status = _STATUS.validate_python(read_json(_status_path(folder, number)), strict=True)
    except (OSError, ValueError):
        return None
    return dict(status)


def clear_status(folder: Path, number: int) -> None:
    """Remove the status of a job that will be started again, so that it counts as waiting."""
    _status_path(folder, number).unlink(missing_ok=True)


def is_running(folder: Path, number: int) -> bool:
    """Return whether a process on any machine is working on the job."""
    try:
        with FileLock(_status_path(folder, number).with_suffix(".lock"), blocking=False):
            return False
    except (Timeout, OSError):  # If in doubt, it runs: starting a job twice is worse than waiting.
        return True


def failure_reason(error: BaseException) -> str:
    """Return the reason of a failure in one sentence."""
    return str(error) if isinstance(error, UserError) else error_sentence(error)


def _status_path(folder: Path, number: int) -> Path:
    return folder / JOBS / f"{number:05d}.json"


def _write_traceback(status_file: Path, error: Exception) -> Path:
    """Write the traceback to a log file next to the status file and return its path."""
    path = status_file.with_suffix(".log")
    text = "".join(traceback.format_exception(error))
    write_bytes(path, redact(text).encode())
    return path


STUDY_FILE = "study.json"


def objective_value(record: Record, name: str) -> float | None:
    """Return the number that a search optimises: a task's headline metric, or a cost.

    A benchmark with one task has no `average`, which the task's own metric replaces.
    """
    metric = record.metric(name)
    headlines = [metric for metric in record.metrics if metric.headline]
    if metric is None and name == "average" and len(headlines) == 1:
        metric = headlines[0]
    if metric is not None:
        return metric.value
    found = [cost.value for cost in record.headline_costs if cost.quantity == name]
    return found[0] if found else None
