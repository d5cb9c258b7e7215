"""The state of a sweep: one small file per job that says how it ended.

A job that fails never stops the others, and the outcome is the same whether a launcher ran the
job in this process or on another machine.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError
from bench.records.atomic import write_bytes

if TYPE_CHECKING:
    from bench.records import Record

JOBS = "jobs"


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
    """Run one job and note how it ended below `folder`; a failure is noted, not raised."""
    note: dict[str, Any] = {"number": number, "command": asked.command}
    result = None
    try:
        result = perform()
        note |= {"state": "done", "run": result.record.id, "reused": result.reused}
        note |= {"warning": result.warning, "results_dir": str(folder.parent.parent)}
    except Exception as error:  # one job's failure, whatever it is, must not stop the sweep
        note |= {"state": "failed", **_failure(error)}
    path = folder / JOBS / f"{number:05d}.json"
    write_bytes(path, (json.dumps(note, indent=1) + "\n").encode())
    return result


def collect(folder: Path, failures: list[str]) -> Iterator[Result]:
    """Yield the results of a sweep's jobs in order; failed ones go to `failures`, a line each."""
    from bench.records import Store

    for path in sorted((folder / JOBS).glob("*.json")):
        note = json.loads(path.read_text())
        if note["state"] == "failed":
            failures.append(f"{note['command']}: {note['reason']} (details: {path})")
            continue
        record = Store(Path(note["results_dir"])).get(note["run"])
        yield Result(record, note["reused"], note["warning"])


def _failure(error: Exception) -> dict[str, str]:
    """One sentence for a person, and the traceback for whoever has to mend it."""
    if isinstance(error, UserError):
        return {"reason": str(error)}
    first = (str(error) or "no message").splitlines()[0]
    return {"reason": f"{type(error).__name__}: {first}", "traceback": traceback.format_exc()}
