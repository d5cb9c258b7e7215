"""One job of a sweep, run under a lock, with a small status file.

A failing job never stops the others, and the outcome is the same whether a launcher ran the job in
this process or on another machine. The lock distinguishes a running job from one whose process has
died: the kernel releases it however the process ends.
"""

from __future__ import annotations

import json
import os
import platform
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from bench.errors import UserError, sentence
from bench.records.atomic import write_bytes
from bench.secrets import hide

if TYPE_CHECKING:
    from bench.records import Record

JOBS = "jobs"
Note = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A requested run: the command that repeats it, and the sweep it belongs to (`group`)."""

    command: str
    group: str | None = None


@dataclass(frozen=True)
class Result:
    """A record, whether it existed before (`reused`), and the tracker's warning."""

    record: Record
    reused: bool
    warning: str | None = None


def keep(folder: Path, number: int, asked: Asked, perform: Callable[[], Result]) -> Result | None:
    """Run one job and keep its status below `folder`; a failure is recorded, not raised.

    A second process with the same job waits for the first and then finds its record. An
    interruption is not a failure of the job: it is recorded as `waiting` and raised.
    """
    note: Note = {"number": number, "command": asked.command, "state": "running"}
    note |= {"host": platform.node(), "pid": os.getpid(), "started": _now()}
    result = None
    path = _path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        write_note(folder, note)
        try:
            result = perform()
            note |= {"state": "done", "run": result.record.id, "reused": result.reused}
            note |= {"warning": result.warning}
        except Exception as error:  # one job's failure, whatever it is, must not stop the sweep
            note |= {"state": "failed", "reason": reason(error)}
            # A UserError needs no traceback: its message is the whole story.
            if not isinstance(error, UserError):
                note["log"] = str(_log(path, error))
        except BaseException:
            note |= {"state": "waiting", "reason": "interrupted", "finished": _now()}
            # A full disk may be what interrupted the run, and then this write fails too; the job
            # then counts as lost, and resuming the sweep runs it again just the same.
            with suppress(OSError):
                write_note(folder, note)
            raise
        write_note(folder, {**note, "finished": _now()})
    return result


def write_note(folder: Path, note: Note) -> None:
    """Write the status of a job atomically."""
    # Commands and error messages may hold tokens, and status files are shared.
    text = hide(json.dumps(note, indent=1))
    write_bytes(_path(folder, note["number"]), (text + "\n").encode())


def read_note(folder: Path, number: int) -> Note | None:
    """Return the status of a job, or None if it has not started or the file is damaged."""
    try:
        note = json.loads(_path(folder, number).read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and "state" in note else None


def forget(folder: Path, number: int) -> None:
    """Remove the status of a job that is to be started again, so that it counts as waiting."""
    _path(folder, number).unlink(missing_ok=True)


def is_alive(folder: Path, number: int) -> bool:
    """Whether a process on any machine is working on the job at the moment."""
    try:
        with FileLock(_path(folder, number).with_suffix(".lock"), blocking=False):
            return False
    except (Timeout, OSError):  # in doubt it runs: starting a job twice is worse than waiting
        return True


def reason(error: BaseException) -> str:
    """Return the reason of a failure in one sentence."""
    return str(error) if isinstance(error, UserError) else sentence(error)


def _path(folder: Path, number: int) -> Path:
    return folder / JOBS / f"{number:05d}.json"


def _log(note: Path, error: Exception) -> Path:
    """Write the traceback to a log file next to the status file and return its path."""
    path = note.with_suffix(".log")
    text = "".join(traceback.format_exception(error))
    write_bytes(path, hide(text).encode())
    return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
