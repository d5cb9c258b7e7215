"""Candidates timed in turn in one process, so that a busy machine slows all of them alike."""

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
"""Runs its work once and returns the seconds of each stage."""
Seconds = dict[str, NDArray[np.float64]]
"""Seconds per stage, [candidates, rounds]."""
Enough = Callable[[Seconds], bool]
"""Whether the rounds so far determine the result precisely enough."""

WINDOW = 3
STEADY = 0.03
STEP = 5
"""Rounds between two precision checks. Odd, because the order alternates per round: the candidate
that runs right after a check, with cold caches, is then not always the same one."""


@dataclass(frozen=True)
class Rounds:
    """Times of all rounds and the state of the machine; `note` says why they may be unreliable."""

    seconds: Seconds
    warm_up: int
    settled: bool
    machine: Reading

    @property
    def count(self) -> int:
        """Number of rounds."""
        return int(next(iter(self.seconds.values())).shape[1])

    @property
    def note(self) -> str | None:
        """Caveat for the reader of these numbers; None if there is none."""
        unsettled = None if self.settled else f"times had not settled after {self.warm_up} rounds"
        return "; ".join(filter(None, (self.machine.fault, unsettled))) or None


def interleave(
    contestants: Sequence[Contestant],
    device: torch.device,
    timing: TimingConfig,
    enough: Enough = lambda _: True,
) -> Rounds:
    """Warm up, then time the candidates round by round; repeat if the machine was loaded.

    The order is reversed every round, so that no candidate always comes first. After
    `timing.rounds` rounds more are added until `enough` returns True or a limit of the config is
    reached. Of several attempts on a loaded machine, the one with the least foreign load is kept.
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
    """Run rounds until their times have settled; return how many, and whether they settled."""
    # The sum over candidates and stages decides: all of them must be warm.
    took: list[float] = []
    for number in range(1, most + 1):
        took.append(sum(sum(contestant().values()) for contestant in contestants))
        if _settled(took):
            return number, True
    return most, False


def _settled(took: Sequence[float]) -> bool:
    """Whether the median of the last three rounds is within 3 % of that of the three before."""
    if len(took) < 2 * WINDOW:
        return False
    before = statistics.median(took[-2 * WINDOW : -WINDOW])
    return abs(statistics.median(took[-WINDOW:]) / before - 1) < STEADY


def _rounds(contestants: Sequence[Contestant], timing: TimingConfig, enough: Enough) -> Seconds:
    """Run rounds until `enough` is satisfied or a limit of the config is reached."""
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
        # Time is checked between batches of rounds only, so `most_seconds` is a soft limit: a
        # started batch is completed, which keeps the number of rounds equal for all candidates.
        late = time.perf_counter() - began >= timing.most_seconds
        if late or wanted >= timing.most_rounds or enough(seconds):
            return seconds
        wanted = min(wanted + STEP, timing.most_rounds)
