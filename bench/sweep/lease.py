"""One job per device: a worker process locks one GPU of its machine until it ends.

The lock is a file in the machine's temporary folder, so that two sweeps on one machine never share
a device, and the kernel releases it however the process ends. Slurm and Ray assign devices
themselves and do not need this.
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
    """Lock the first free one of `devices`, waiting if necessary, and hide all others.

    Must be called before CUDA is initialised in this process. Returns the device, or None if
    `devices` is empty. A process that already holds a device keeps it.
    """
    if not devices:
        return None
    if _HELD:
        return os.environ["CUDA_VISIBLE_DEVICES"]
    # One folder per user, readable by that user only: in a shared /tmp another user's files could
    # not be locked. Devices are therefore not protected against other users.
    folder = Path(tempfile.gettempdir()) / f"slimbench-devices-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while True:
        for device in devices:
            lock = FileLock(folder / f"{device.replace('/', '_')}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            # The module keeps a reference, or the lock would be released when it is collected.
            _HELD.append(lock)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            return device
        time.sleep(POLL_SECONDS)


def give_back() -> None:
    """Release the device of this process, which must not use it any more."""
    while _HELD:
        _HELD.pop().release()
