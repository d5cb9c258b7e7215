"""Time and memory limits of a job, enforced by its own process where no scheduler does."""

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

    The memory limit covers private allocations of the process, not mapped files or device memory.
    Must be entered in the main thread, where Python delivers signals.
    """

    def expire(signum: int, frame: FrameType | None) -> NoReturn:
        raise TooLong(f"the job ran longer than its limit of {minutes:g} minutes")

    # RLIMIT_DATA instead of RLIMIT_AS: the address space includes mapped weights and what CUDA
    # reserves, far beyond the memory in use.
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
