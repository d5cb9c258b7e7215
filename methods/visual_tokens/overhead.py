"""Time spent on choosing visual tokens, reported separately in a measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.device import synchronize


@dataclass
class Overhead:
    """Seconds spent in pruning steps, and their number, since the last `reset`.

    Exact only if `synchronized`: otherwise a GPU may still be working when the clock stops.
    """

    seconds: float = 0.0
    selections: int = 0
    synchronised: bool = False

    def reset(self) -> None:
        """Set both to zero."""
        self.seconds, self.selections = 0.0, 0

    @contextmanager
    def measured(self) -> Iterator[Overhead]:
        """Reset, and synchronise with the device around every pruning step inside the block."""
        self.reset()
        before, self.synchronised = self.synchronised, True
        try:
            yield self
        finally:
            self.synchronised = before

    @contextmanager
    def clocked(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block as one pruning step."""
        self._wait(device)
        start = time.perf_counter()
        yield
        self._wait(device)
        self.seconds += time.perf_counter() - start
        self.selections += 1

    def _wait(self, device: torch.device) -> None:
        # Off by default: waiting for the device at every step would slow down the prefill that is
        # being measured.
        if self.synchronised:
            synchronize(device)
