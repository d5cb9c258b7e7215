"""Agreement between the order of methods here and in the source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from bench.reporting.tables.numbers import NORMAL
from bench.reporting.tables.table import Ours


class Rated(NamedTuple):
    """One method with both of its numbers."""

    name: str
    ours: Ours
    theirs: float


class Pairs(NamedTuple):
    """Counts of pairs of methods: same order, reversed order, too close to call."""

    same: int
    other: int
    close: int


def pairs(rated: Sequence[Rated]) -> Pairs:
    """Compare all pairs of methods; a tie on either side counts as close."""
    same = other = close = 0
    for one, two in combinations(rated, 2):
        here, there = one.ours.value - two.ours.value, one.theirs - two.theirs
        error = math.hypot(one.ours.stderr or 0.0, two.ours.stderr or 0.0)
        # The errors of the two methods are treated as independent. Both are scored on the same
        # samples, so the error of the difference is usually smaller and some close pairs are not.
        if abs(here) <= NORMAL * error or here * there == 0:
            close += 1
        elif here * there > 0:
            same += 1
        else:
            other += 1
    return Pairs(same, other, close)


def tau(rated: Sequence[Rated]) -> float | None:
    """Return Kendall's tau-b between our values and theirs; None for fewer than three methods."""
    if len(rated) < 3:
        return None
    from scipy.stats import kendalltau

    value = float(kendalltau([r.ours.value for r in rated], [r.theirs for r in rated]).statistic)
    # Kendall's tau is undefined where all values of one side are equal.
    return None if math.isnan(value) else value


def best_first(names: Sequence[str], values: Sequence[float], lower: bool) -> tuple[str, ...]:
    """Return the names, the best value first."""
    ranked = sorted(zip(values, names, strict=True), key=lambda pair: pair[0], reverse=not lower)
    return tuple(name for _, name in ranked)
