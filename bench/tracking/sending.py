"""Sending one record online from a process of its own, which can be ended when it takes too long.

W&B's client waits for minutes for a server that does not answer, and once more when its process
ends. A run has no such time: after `timeout` seconds the process is killed with all it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.errors import sentence
from bench.tracking.config import INIT_SECONDS, TrackerConfig

_MODULE = "bench.tracking.sending"


class NotSent(Exception):
    """The record did not arrive; the message says why in one line."""


class NoAnswer(NotSent):
    """It took longer than a server that is well takes to say hello."""


def send_apart(run: str, results_dir: Path, config: TrackerConfig) -> str:
    """Send a stored record in a process of its own; return where the W&B run is.

    Raises:
        NotSent: it failed, or took too long.
    """
    command = [sys.executable, "-m", _MODULE, run, str(results_dir), config.model_dump_json()]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = process.communicate(timeout=config.timeout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {config.timeout:g} s") from None
    finally:
        _end(process)
    if process.returncode != 0:
        lines = complained.strip().splitlines() or [f"exit code {process.returncode}"]
        waited = time.monotonic() - began > INIT_SECONDS
        raise (NoAnswer if waited else NotSent)(lines[-1])
    return said.strip().splitlines()[-1]


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process and of those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(run: str, results_dir: str, config: str) -> None:
    """Send one record and print where it is; leave at once, for the client's own farewell waits."""
    from bench.records import Store
    from bench.tracking.wandb import send

    store = Store(Path(results_dir))
    code, said = 0, ""
    try:
        chosen = TrackerConfig.model_validate_json(config)
        said = send(store.get(run), store.folder(run), chosen, store.root)
    except Exception as error:  # whatever it is, the one who waits is told in one line
        code = 1
        print(sentence(error), file=sys.stderr)
    print(said, flush=True)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
