"""What choosing among visual tokens itself costs, as its own line of a measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.device import synchronize


@dataclass
class Overhead:
    """Seconds spent in selections, and how many there were, since the last `reset`.

    Exact only where `synchronised`: otherwise a GPU may still be at work when the clock stops.
    """

    seconds: float = 0.0
    selections: int = 0
    synchronised: bool = False

    def reset(self) -> None:
        """Begin anew."""
        self.seconds, self.selections = 0.0, 0

    @contextmanager
    def measured(self) -> Iterator[Overhead]:
        """Begin anew and wait for the device around every selection, while the block lasts."""
        self.reset()
        before, self.synchronised = self.synchronised, True
        try:
            yield self
        finally:
            self.synchronised = before

    @contextmanager
    def clocked(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block, one selection."""
        self._wait(device)
        start = time.perf_counter()
        yield
        self._wait(device)
        self.seconds += time.perf_counter() - start
        self.selections += 1

    def _wait(self, device: torch.device) -> None:
        if self.synchronised:
            synchronize(device)
