"""Search for the experts to drop: all subsets if affordable, otherwise greedy elimination."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

Error = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class Found:
    """Experts to drop, the error without them, and the number of subsets tried."""

    dropped: tuple[int, ...]
    error: float
    how: Literal["exhaustive", "greedy"]
    tried: int


def search(experts: int, count: int, error: Error, limit: int) -> Found:
    """Return `count` of `experts` experts to drop.

    If there are at most `limit` subsets, all are tried, as in NAEE. Otherwise greedy elimination,
    which is not in the paper: the expert whose removal adds the least error is removed first, then
    the next one given the first, and so on; count · (experts - (count - 1) / 2) subsets are tried.
    Ties go to the first candidate in both.
    """
    if math.comb(experts, count) <= limit:
        errors = {subset: error(subset) for subset in combinations(range(experts), count)}
        best = min(errors, key=errors.__getitem__)
        return Found(best, errors[best], "exhaustive", len(errors))
    dropped: tuple[int, ...] = ()
    lowest, tried = math.inf, 0
    for _ in range(count):
        expert, lowest = next_to_go(experts, dropped, error)
        tried += experts - len(dropped)
        dropped = (*dropped, expert)
    return Found(tuple(sorted(dropped)), lowest, "greedy", tried)


def next_to_go(experts: int, dropped: tuple[int, ...], error: Error) -> tuple[int, float]:
    """Return the expert whose removal on top of `dropped` adds the least error, and that error."""
    left = [expert for expert in range(experts) if expert not in dropped]
    errors = {expert: error((*dropped, expert)) for expert in left}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]
