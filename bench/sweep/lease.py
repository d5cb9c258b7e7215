"""One job per device: a worker process takes one GPU of its machine and keeps it until it ends.

The lease is a lock in the machine's own temporary folder, so that two sweeps on one machine do not
meet on a device, and so that the kernel gives it back however the process ends. Slurm and Ray
hand out devices themselves and need none of this.
"""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

_HELD: list[FileLock] = []
POLL_SECONDS = 0.5


def lease(devices: Sequence[str]) -> str | None:
    """Take the first free one of `devices`, waiting for it, and let this process see no other.

    Must be called before CUDA is used in this process. Returns the device; None when there is
    none to take. A process that holds one already keeps it.
    """
    if not devices:
        return None
    if _HELD:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    folder = Path(tempfile.gettempdir()) / f"slimbench-devices-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for device in devices:
            lock = FileLock(folder / f"{device.replace('/', '_')}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            _HELD.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        time.sleep(POLL_SECONDS)


def give_back() -> None:
    """Give the device of this process back; the process must not use it any more."""
    while _HELD:
        _HELD.pop().release()
