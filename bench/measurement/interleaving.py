"""Contestants timed in turn in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bench.device.machine import Reading, Watch
from bench.measurement.config import TimingConfig

Contestant = Callable[[], dict[str, float]]
"""Does its work once and returns the seconds of each stage."""
Seconds = dict[str, NDArray[np.float64]]
"""Of each stage, [contestants, rounds]."""
Enough = Callable[[Seconds], bool]
"""Whether what is wanted is known well enough from so many rounds."""

WINDOW = 3
STEADY = 0.03
STEP = 5
"""Rounds between two looks at whether they are enough: odd, so that not always the same contestant
is the one that runs after a look, with nothing in the cache."""


@dataclass(frozen=True)
class Rounds:
    """What was timed, and on which machine; `note` says why not to trust it."""

    seconds: Seconds
    warm_up: int
    settled: bool
    machine: Reading

    @property
    def count(self) -> int:
        """How many rounds there were."""
        return int(next(iter(self.seconds.values())).shape[1])

    @property
    def note(self) -> str | None:
        """What a reader must know before using these numbers; None where all is well."""
        unsettled = None if self.settled else f"times had not settled after {self.warm_up} rounds"
        return "; ".join(filter(None, (self.machine.fault, unsettled))) or None


def interleave(
    contestants: Sequence[Contestant],
    device: torch.device,
    timing: TimingConfig,
    enough: Enough = lambda _: True,
) -> Rounds:
    """Time the contestants round by round after a warm-up, again where the machine was loaded.

    Every other round runs in the opposite order, so that none always comes first. After
    `timing.rounds` more are added until they are `enough`, or until the config's limits. Of
    several attempts on a loaded machine the one is kept in which others took least.
    """
    warm_up, settled = _warm_up(contestants, timing.warm_up)
    attempts: list[Rounds] = []
    for _ in range(timing.attempts):
        with Watch(device) as watch:
            seconds = _rounds(contestants, timing, enough)
        attempts.append(Rounds(seconds, warm_up, settled, watch.reading))
        if watch.reading.fault is None:
            break
    return min(attempts, key=lambda each: (bool(each.machine.fault), each.machine.others))


def _warm_up(contestants: Sequence[Contestant], most: int) -> tuple[int, bool]:
    """Run rounds until they take what the rounds before took; how many, and whether they do."""
    took: list[float] = []
    for number in range(1, most + 1):
        took.append(sum(sum(contestant().values()) for contestant in contestants))
        if _settled(took):
            return number, True
    return most, False


def _settled(took: Sequence[float]) -> bool:
    """Whether the median of the last rounds is within 3 % of that of as many before them."""
    if len(took) < 2 * WINDOW:
        return False
    before = statistics.median(took[-2 * WINDOW : -WINDOW])
    return abs(statistics.median(took[-WINDOW:]) / before - 1) < STEADY


def _rounds(contestants: Sequence[Contestant], timing: TimingConfig, enough: Enough) -> Seconds:
    """Run rounds until they are enough, or as many as are allowed."""
    kept: list[list[dict[str, float]]] = [[] for _ in contestants]
    order, began = list(range(len(contestants))), time.perf_counter()
    wanted = timing.rounds
    while True:
        while len(kept[0]) < wanted:
            for number in order:
                kept[number].append(contestants[number]())
            order.reverse()
        seconds = {
            stage: np.array([[lap[stage] for lap in laps] for laps in kept]) for stage in kept[0][0]
        }
        late = time.perf_counter() - began >= timing.most_seconds
        if late or wanted >= timing.most_rounds or enough(seconds):
            return seconds
        wanted = min(wanted + STEP, timing.most_rounds)
