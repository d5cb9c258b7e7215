"""Time and memory limits of a job, kept by its own process where no scheduler keeps them."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GIB = 2**30


class TooLong(Exception):
    """A job ran longer than its launcher allows."""


@contextmanager
def limited(minutes: float | None, memory_gb: float | None) -> Iterator[None]:
    """Raise `TooLong` in the block after `minutes`, and MemoryError beyond `memory_gb` of data.

    The memory limit is on what the process allocates for itself, not on mapped files or devices.
    Must be entered by the main thread, as signals are.
    """

    def expire(signum: int, frame: FrameType | None) -> NoReturn:
        raise TooLong(f"the job ran longer than its limit of {minutes:g} minutes")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.getsignal(signal.SIGALRM)
    try:
        if memory_gb is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * GIB), hard))
        if minutes is not None:
            signal.signal(signal.SIGALRM, expire)
            signal.setitimer(signal.ITIMER_REAL, minutes * 60)
        yield
    finally:
        if minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
