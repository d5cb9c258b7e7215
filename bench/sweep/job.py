"""One job of a sweep: run under a lock, with a small file that says how far it is.

A job that fails never stops the others, and the outcome is the same whether a launcher ran the
job in this process or on another machine. The lock tells a job that runs from one whose process
is gone: the kernel gives it back however the process ends.
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
    """How a run was asked for: the command that repeats it, and the sweep it belongs to."""

    command: str
    group: str | None = None


@dataclass(frozen=True)
class Result:
    """A record, whether it was there already, and what the tracker had to say."""

    record: Record
    reused: bool
    warning: str | None = None


def keep(folder: Path, number: int, asked: Asked, perform: Callable[[], Result]) -> Result | None:
    """Run one job and note how it goes below `folder`; a failure is noted, not raised.

    A second process with the same job waits for the first and then finds its record. What is no
    failure of the job, an interruption, is noted as such and goes on upwards.
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
            if not isinstance(error, UserError):
                note["log"] = str(_log(path, error))
        except BaseException:
            note |= {"state": "waiting", "reason": "interrupted", "finished": _now()}
            with suppress(OSError):  # a disk that stops a run takes no note of it either
                write_note(folder, note)
            raise
        write_note(folder, {**note, "finished": _now()})
    return result


def write_note(folder: Path, note: Note) -> None:
    """Write the note of a job, whole or not at all."""
    text = hide(json.dumps(note, indent=1))
    write_bytes(_path(folder, note["number"]), (text + "\n").encode())


def read_note(folder: Path, number: int) -> Note | None:
    """Return the note of a job, or None when it has not begun; a damaged one is as good as none."""
    try:
        note = json.loads(_path(folder, number).read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and "state" in note else None


def forget(folder: Path, number: int) -> None:
    """Remove the note of a job that is to begin anew, so that it waits again."""
    _path(folder, number).unlink(missing_ok=True)


def is_alive(folder: Path, number: int) -> bool:
    """Whether a process, on whatever machine, is working on the job just now."""
    try:
        with FileLock(_path(folder, number).with_suffix(".lock"), blocking=False):
            return False
    except (Timeout, OSError):
        return True


def reason(error: BaseException) -> str:
    """Say in one sentence why a job failed."""
    return str(error) if isinstance(error, UserError) else sentence(error)


def _path(folder: Path, number: int) -> Path:
    return folder / JOBS / f"{number:05d}.json"


def _log(note: Path, error: Exception) -> Path:
    """Leave the traceback for whoever has to mend it, and return where it is."""
    path = note.with_suffix(".log")
    text = "".join(traceback.format_exception(error))
    write_bytes(path, hide(text).encode())
    return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
