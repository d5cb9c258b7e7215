"""The ratio of two things that were timed in turn, with an interval.

Suffixes: R rounds, S resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 95


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float


def paired_ratio(above_R: NDArray[np.float64], below_R: NDArray[np.float64]) -> Ratio:
    """Return the median over rounds of above / below, with a percentile bootstrap over rounds.

    Both numbers of a round were taken one after the other, so their ratio is free of what made
    the whole round slow; the ratio of the two medians is not.
    """
    ratio_R = above_R / below_R
    draws = np.random.default_rng(0)
    chosen_SR = draws.integers(len(ratio_R), size=(RESAMPLES, len(ratio_R)))
    median_S = np.median(ratio_R[chosen_SR], axis=1)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(median_S, [tail, 100 - tail])
    return Ratio(float(np.median(ratio_R)), float(low), float(high))
