"""Marks on a device's own time line, and the seconds between them.

On a GPU a mark is a CUDA event in the stream that the work is in: setting it waits for nothing, so
a call is not slowed by being watched, and the time is the device's. On a CPU it is a reading of
`perf_counter`.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from bench.device import synchronize


class Clock:
    """One series of marks. The device has finished all earlier work before the first of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []
        synchronize(device)

    def mark(self) -> None:
        """Set a mark after all that has been asked of the device so far."""
        if self._device.type != "cuda":
            self._seconds.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def laps(self) -> list[float]:
        """Wait for the device and return the seconds from each mark to the next."""
        synchronize(self._device)
        if self._device.type != "cuda":
            return [after - before for before, after in pairwise(self._seconds)]
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
