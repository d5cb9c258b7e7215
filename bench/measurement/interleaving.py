"""Interleaved timing of candidates in one process, and their ratio with its confidence interval.

Suffixes: R rounds, S resamples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from bench.device.machine import MachineReading, measured_quietly
from bench.schema import TimingConfig

Candidate = Callable[[], dict[str, float]]
"""Runs its work once and returns the seconds of each stage."""
StageSeconds = dict[str, NDArray[np.float64]]
"""Seconds per stage, [candidates, rounds]."""
StoppingRule = Callable[[StageSeconds], bool]
"""Returns whether the rounds so far determine the result precisely enough."""
SETTLING_WINDOW = 3
SETTLING_TOLERANCE = 0.03
ROUNDS_PER_CHECK = 5
"""Rounds between two precision checks. Odd, because the order alternates per round, so that the
candidate right after a check, with cold caches, is not always the same."""


@dataclass(frozen=True)
class TimedRounds:
    """Times of all rounds and the state of the machine; `note` says why they may be unreliable."""

    seconds: StageSeconds
    warmup_rounds: int
    settled: bool
    machine: MachineReading

    @property
    def count(self) -> int:
        """Number of rounds."""
        return int(next(iter(self.seconds.values())).shape[1])

    @property
    def note(self) -> str | None:
        """Caveat for the reader of these numbers; None if there is none."""
        unsettled = (
            None if self.settled else f"times had not settled after {self.warmup_rounds} rounds"
        )
        return "; ".join(filter(None, (self.machine.fault, unsettled))) or None


def interleave(
    candidates: Sequence[Candidate],
    device: torch.device,
    timing: TimingConfig,
    is_precise: StoppingRule = lambda _: True,
) -> TimedRounds:
    """Warm up, then time the candidates round by round; repeat if the machine was busy.

    The order is reversed every round, so that no candidate is always first. After `timing.rounds`
    rounds, more are added until `is_precise` returns True or a limit of the config is reached. Of
    several attempts on a busy machine, the one with the least load by other processes is kept.
    """
    warmup_rounds, settled = _warm_up(candidates, timing.max_warmup_rounds)
    seconds, machine = measured_quietly(
        partial(_time_rounds, candidates, timing, is_precise), device, timing.attempts
    )
    return TimedRounds(seconds, warmup_rounds, settled, machine)


def _warm_up(candidates: Sequence[Candidate], max_rounds: int) -> tuple[int, bool]:
    """Run rounds until times have settled; return their number, and whether times settled."""
    # Based on the sum over candidates and stages, because all of them must be warm.
    round_seconds: list[float] = []
    for number in range(1, max_rounds + 1):
        round_seconds.append(sum(sum(candidate().values()) for candidate in candidates))
        if _is_settled(round_seconds):
            return number, True
    return max_rounds, False


def _is_settled(round_seconds: Sequence[float]) -> bool:
    """Return whether the median of the last three rounds is within 3 % of the previous three."""
    if len(round_seconds) < 2 * SETTLING_WINDOW:
        return False
    before = statistics.median(round_seconds[-2 * SETTLING_WINDOW : -SETTLING_WINDOW])
    now = statistics.median(round_seconds[-SETTLING_WINDOW:])
    return abs(now / before - 1) < SETTLING_TOLERANCE


def _time_rounds(
    candidates: Sequence[Candidate], timing: TimingConfig, is_precise: StoppingRule
) -> StageSeconds:
    """Run rounds until `is_precise` is satisfied or a limit of the config is reached."""
    measured: list[list[dict[str, float]]] = [[] for _ in candidates]
    order, started = list(range(len(candidates))), time.perf_counter()
    target = timing.rounds
    while True:
        while len(measured[0]) < target:
            for number in order:
                measured[number].append(candidates[number]())
            order.reverse()
        seconds = {
            stage: np.array([[lap[stage] for lap in laps] for laps in measured])
            for stage in measured[0][0]
        }
        # Time is checked only between batches of rounds, so `max_seconds` is a soft limit: a
        # started batch is completed, which keeps the number of rounds equal for all candidates.
        late = time.perf_counter() - started >= timing.max_seconds
        if late or target >= timing.max_rounds or is_precise(seconds):
            return seconds
        target = min(target + ROUNDS_PER_CHECK, timing.max_rounds)


RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.99
"""A run prints a dozen intervals, of which some would exclude 1 by chance at 95 %."""


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 99 % interval."""

    value: float
    low: float
    high: float

    @property
    def relative_reach(self) -> float:
        """Distance from the ratio to the farther end of the interval, relative to the ratio."""
        return max(self.high - self.value, self.value - self.low) / self.value


def paired_ratio(numerator_R: NDArray[np.float64], denominator_R: NDArray[np.float64]) -> Ratio:
    """Return the median over rounds of the ratio, with a bootstrap interval over rounds.

    Both times of a round are measured one after the other, so their ratio is not affected by
    anything that slows the whole round, unlike the ratio of the two medians.
    """
    ratio_R = numerator_R / denominator_R
    # With a fixed seed, the same times always give the same interval.
    rng = np.random.default_rng(0)
    chosen_SR = rng.integers(len(ratio_R), size=(RESAMPLES, len(ratio_R)))
    median_S = np.median(ratio_R[chosen_SR], axis=1)
    tail = _tail_probability(len(ratio_R))
    low, high = np.quantile(median_S, [tail, 1 - tail])
    return Ratio(float(np.median(ratio_R)), float(low), float(high))


def _tail_probability(rounds: int) -> float:
    """Return the share of resamples beyond either end of the interval.

    Plain bootstrap percentiles are too narrow for a few rounds: at a nominal 95 % and 15 rounds
    they cover 88 %. They are expanded as in Hesterberg (The American Statistician 69, 2015): the
    tail is the normal probability of -sqrt(n / (n - 1)) t, with t of n - 1 degrees of freedom.
    """
    # Imported here, because scipy.stats is slow to import and only measurements need it.
    from scipy.stats import norm, t

    quantile = t.ppf((1 + CONFIDENCE_LEVEL) / 2, rounds - 1)
    return float(norm.cdf(-sqrt(rounds / (rounds - 1)) * quantile))
