"""Clock of a device: marks on its time line, and the seconds between them.

On a GPU a mark is a CUDA event in the current stream. Recording it does not synchronise, so timing
does not slow the work down, and the times are the device's own. On a CPU a mark is a reading of
`perf_counter`.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from bench.device import synchronize


class Clock:
    """A series of marks; the device finishes all earlier work before the first one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []
        synchronize(device)

    def mark(self) -> None:
        """Set a mark behind all work queued on the device so far."""
        if self._device.type != "cuda":
            self._seconds.append(time.perf_counter())
            return
        # A CUDA call returns before its kernels have run: `perf_counter` would time the launches.
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def laps(self) -> list[float]:
        """Wait for the device and return the seconds from each mark to the next."""
        # `elapsed_time` raises unless both events have completed.
        synchronize(self._device)
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._seconds)]
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
