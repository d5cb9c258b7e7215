"""W&B's client in a separate process, which receives events during a run and can be abandoned.

W&B's client waits for minutes if a server does not answer, and again when its process exits. A run
cannot afford that, so the client runs in a separate process. The run writes one line of JSON per
event to its standard input, without ever waiting: events are dropped if the pipe is full. The
record is sent at the end and contains all numbers. After another `timeout` seconds the process and
its children are killed.
    {"id", "results_dir", ...}             the first line, see `Opening`
    {"phase", "share", "seconds"}          a phase began or advanced
    {"task", "value", "stderr"}            a task has its number
    {"record"}  or  {"failed"}             the last line; a run that was killed sends none
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from bench.errors import error_sentence
from bench.records.record import JsonObject
from bench.schema import WANDB_INIT_SECONDS, TrackerConfig
from bench.ui import note

if TYPE_CHECKING:
    from wandb import Run

_MODULE = "bench.tracking.upload"
SECONDS_BETWEEN_EVENTS = 2.0
"""Minimum time between two events of a phase."""
SECONDS_FOR_A_FAILED_RUN = 10.0
"""Time that a failed or interrupted run waits for W&B to be notified."""


class UploadFailed(Exception):
    """The upload failed; the message gives the reason in one line."""


class UploadTimeout(UploadFailed):
    """The upload took longer than a responsive server needs."""


@dataclass(frozen=True)
class Opening:
    """The record to send, and what its W&B run shows before the record exists."""

    id: str
    results_dir: str
    tracker: JsonObject
    live: LiveRun | None = None
    """None if the record exists already."""
    dense_ratio: float | None = None
    """Score of an existing record relative to the dense run's."""


@dataclass(frozen=True)
class LiveRun:
    """What a W&B run shows from its start."""

    name: str
    group: str | None
    tags: list[str]
    config: JsonObject
    watched: int = field(default_factory=os.getpid)
    """Process whose use of processor, accelerator and memory W&B records."""


class Upload:
    """The process that sends one record, a `bench.ui.Watcher` of the run that creates it."""

    def __init__(self, opening: Opening, timeout: float) -> None:
        self._timeout, self._run = timeout, opening.id
        self._output = b""
        self._announced = False
        self._last_event = 0.0
        self._phase: object = None
        # -P keeps the working folder off sys.path, because it may contain an untrusted `bench.py`.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # W&B's client starts its own service process. A new session puts both into a process
            # group, which can be killed as a whole and does not receive the terminal's Ctrl-C.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        # The process reads this line before it imports anything that could hang.
        with suppress(BrokenPipeError):  # `send` reports why the reader has ended.
            self._process.stdin.write(_line(asdict(opening)))
        os.set_blocking(self._process.stdin.fileno(), False)

    def phase(self, name: str, share: float | None, seconds: float) -> None:
        """Show the phase of the run, of which `share` is done, `seconds` after the run's start."""
        now = time.monotonic()
        if name == self._phase and now - self._last_event < SECONDS_BETWEEN_EVENTS:
            return
        self._phase, self._last_event = name, now
        self._write({"phase": name, "share": share, "seconds": seconds})
        self._announce()

    def result(self, task: str, value: float, stderr: float | None) -> None:
        """Show the headline number of a task that has ended."""
        self._write({"task": task, "value": value, "stderr": stderr})

    def send(self) -> str:
        """Send the stored record; return the URL or folder of the W&B run, empty if it has none.

        Raises:
            UploadFailed: the upload failed or timed out.
        """
        started = time.monotonic()
        errors = self._end({"record": self._run}, self._timeout)
        if self._process.returncode != 0:
            # The last line is printed by `main`, earlier ones by the client.
            code = self._process.returncode
            lines = errors.decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
            # The client may give up before our timeout. After such a long wait, this also means
            # that the server does not answer.
            waited = time.monotonic() - started > WANDB_INIT_SECONDS
            raise (UploadTimeout if waited else UploadFailed)(lines[-1])
        return (self._output.decode(errors="replace").strip().splitlines() or [""])[-1]

    def abandon(self) -> None:
        """Mark the W&B run as failed, if the server answers soon; never raise."""
        try:
            self._end({"failed": True}, min(self._timeout, SECONDS_FOR_A_FAILED_RUN))
        except UploadFailed:
            return

    def _end(self, last: JsonObject, timeout: float) -> bytes:
        """Send the last line, wait for the process and return its errors."""
        try:
            output, errors = self._process.communicate(_line(last), timeout)
        except subprocess.TimeoutExpired:
            raise UploadTimeout(f"no answer within {self._timeout:g} s") from None
        finally:
            # Also after success, because the client's service process may outlive the client.
            _kill_process_group(self._process)
        self._output += output
        return errors

    def _write(self, event: JsonObject) -> None:
        """Write an event, unless the pipe is full or its reader has ended."""
        line = _line(event)
        # Longer lines could be written to the pipe in part.
        if self._process.stdin is not None and len(line) <= select.PIPE_BUF:
            try:
                self._process.stdin.write(line)
            except OSError:  # `send` reports why the reader has ended.
                return

    def _announce(self) -> None:
        """Print once where the run can be watched."""

        if self._announced or self._process.stdout is None:
            return
        os.set_blocking(self._process.stdout.fileno(), False)
        self._output += self._process.stdout.read() or b""
        line, ended, _ = self._output.decode(errors="replace").partition("\n")
        if ended and line.startswith("http"):
            note(f"W&B: {line}")
        self._announced = bool(ended)


def _line(content: JsonObject) -> bytes:
    return json.dumps(content).encode() + b"\n"


def upload_in_subprocess(
    run: str, results_dir: Path, config: TrackerConfig, dense_ratio: float | None = None
) -> str:
    """Send a stored record from a separate process; return the URL of the W&B run.

    Raises:
        UploadFailed: the upload failed or timed out.
    """
    opening = Opening(run, str(results_dir), config.model_dump(), dense_ratio=dense_ratio)
    return Upload(opening, config.timeout).send()


def _kill_process_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, as far as they are still running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


class _RunFailed(Exception):
    """The run that W&B shows has ended without a record."""


def main() -> None:
    """Read the events and print the URL; exit without the client's exit handlers, which wait."""
    code = 0
    try:
        _follow(sys.stdin.buffer)
    except Exception as error:  # Any error is passed to the parent as one line.
        code = 1
        print(error_sentence(error), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # `os._exit` skips atexit handlers and does not flush buffers, hence the explicit flushes.
    os._exit(code)


def _follow(lines: IO[bytes]) -> None:
    """Send the record named in the first line, immediately or after the events of its run."""
    from bench.records import Store
    from bench.tracking.wandb_run import finish_live_run, open_wandb_run, send_record

    opening = json.loads(lines.readline())
    config = TrackerConfig.model_validate(opening["tracker"])
    store, name, live = Store(Path(opening["results_dir"])), opening["id"], opening["live"]
    if live is None:
        ratio = opening["dense_ratio"]
        kept = send_record(store.get(name), store.folder(name), config, store.root, ratio)
        print(kept or "")
        return
    with open_wandb_run(
        config,
        store.root,
        name=live["name"],
        job_type="run",
        group=live["group"],
        tags=live["tags"],
        config_of_run=live["config"],
        run_id=name,
        watched=live["watched"],
    ) as (wandb, run, kept):
        print(kept or "", flush=True)
        if not _log_events(run, map(json.loads, lines)):
            raise _RunFailed(name)
        finish_live_run(wandb, run, store.get(name), store.folder(name), config)


def _log_events(run: Run, events: Iterable[JsonObject]) -> bool:
    """Log events until the last one; return whether it announces a record."""
    for event in events:
        if "phase" in event:
            run.summary["phase"] = event["phase"]
            numbers = {"progress/seconds": event["seconds"], "progress/share": event["share"]}
        elif "task" in event:
            numbers = {event["task"]: event["value"], f"{event['task']}_stderr": event["stderr"]}
        else:
            return "record" in event
        run.log({key: value for key, value in numbers.items() if value is not None})
    return False


if __name__ == "__main__":
    main()
