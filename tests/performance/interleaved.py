"""Ratios of two things timed in turn in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def times(
    contestants: Sequence[Callable[[], object]],
    rounds: int = 7,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Run the contestants in turn, `rounds` times after one warm-up; seconds of each.

    For work of a single thread, `clock=time.process_time` leaves out the waits for a core.
    """
    for contestant in contestants if warm_up else ():
        contestant()
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, kept in zip(contestants, seconds, strict=True):
            began = clock()
            contestant()
            kept.append(clock() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Return the ratio of the minima and the ratio of the medians."""
    return min(above) / min(below), statistics.median(above) / statistics.median(below)
