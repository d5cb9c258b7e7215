"""Upload of one record from a separate process that can be killed when it takes too long.

W&B's client waits for minutes for a server that does not answer, and once more when its process
exits. A run cannot afford that: after `timeout` seconds the process and its children are killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.errors import error_sentence
from bench.schema import WANDB_INIT_SECONDS, TrackerConfig

_MODULE = "bench.tracking.upload"


class UploadFailed(Exception):
    """The upload failed; the message gives the reason in one line."""


class UploadTimeout(UploadFailed):
    """The upload took longer than a healthy server needs to answer."""


def upload_in_subprocess(run: str, results_dir: Path, config: TrackerConfig) -> str:
    """Send a stored record from a separate process; return the URL of the W&B run.

    Raises:
        UploadFailed: the upload failed or timed out.
    """
    # -P keeps the working folder off sys.path, where a stranger's `bench.py` may lie.
    command = [sys.executable, "-P", "-m", _MODULE, run, str(results_dir)]
    command.append(config.model_dump_json())
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # W&B's client starts its own service process. A new session puts both into one process
        # group, which can be killed as a whole, and keeps Ctrl-C of the terminal away from them.
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=config.timeout)
    except subprocess.TimeoutExpired:
        raise UploadTimeout(f"no answer within {config.timeout:g} s") from None
    finally:
        # Also after success: the client's service process may outlive the client.
        _kill_process_group(process)
    if process.returncode != 0:
        # The last line of stderr is the one that `main` prints; earlier ones are the client's.
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        # The client may give up by itself before our timeout; after so long a wait that means a
        # silent server as well.
        waited = time.monotonic() - started > WANDB_INIT_SECONDS
        raise (UploadTimeout if waited else UploadFailed)(lines[-1])
    return output.strip().splitlines()[-1]


def _kill_process_group(process: subprocess.Popen[str]) -> None:
    """Kill the process and its children, as far as they are still running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(run: str, results_dir: str, config: str) -> None:
    """Send one record and print its URL; exit without the client's exit handlers, which wait."""
    from bench.records import Store
    from bench.tracking.wandb_run import send_record

    store = Store(Path(results_dir))
    code, url = 0, ""
    try:
        chosen = TrackerConfig.model_validate_json(config)
        url = send_record(store.get(run), store.folder(run), chosen, store.root) or ""
    except Exception as error:  # whatever it is, the parent gets it as one line
        code = 1
        print(error_sentence(error), file=sys.stderr)
    print(url, flush=True)
    sys.stderr.flush()
    # `os._exit` skips atexit handlers and buffers alike, hence the explicit flushes.
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
