"""How good estimates were: measured times of recorded phases against their bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import exp, inf, isfinite, log
from typing import NamedTuple

from bench.records import Record

SHORTEST = 0.5
"""Seconds below which a phase is noise: it is not held against its estimate."""
_PREFIX = "phase "
_ALWAYS = ("counting costs", "measuring costs")
"""Phases of every run; that of loading lacks where a model was there already."""


class Compared(NamedTuple):
    """One phase of one record: what was estimated and what was measured, in seconds.

    Bounds are None where nothing was estimated, `measured` where no time was kept.
    """

    run: str
    phase: str
    low: float | None
    high: float | None
    measured: float | None

    @property
    def inside(self) -> bool:
        """Whether the measured time lies between the bounds; inverted ones hold nothing."""
        if self.low is None or self.high is None or self.measured is None:
            return False
        return self.low <= self.measured <= self.high

    @property
    def width(self) -> float:
        """The upper bound over the lower; infinite where that is 0, or a bound is not a number."""
        if self.low is None or self.high is None or not 0 < self.low <= self.high:
            return inf
        return self.high / self.low

    @property
    def matters(self) -> bool:
        """Whether it was, or should have been, longer than noise."""
        # Not `max`, which drops a bound that is not a number.
        return any(not seconds < SHORTEST for seconds in (self.low, self.measured) if seconds)

    @property
    def kind(self) -> str:
        """The phase without the names of models and tasks."""
        return "evaluating" if " on " in self.phase else self.phase


def compared_phases(records: Iterable[Record]) -> Iterator[Compared]:
    """Yield the phases of records with an estimate: all that were estimated, then all others.

    What was estimated and has no time, or the reverse, is a flaw of the estimate as well.
    """
    for record in records:
        if not record.estimate:
            continue
        measured = {
            cost.scope.removeprefix(_PREFIX): cost.value
            for cost in record.costs
            if cost.scope.startswith(_PREFIX) and cost.quantity == "wall"
        }
        for each in record.estimate:
            took = measured.pop(each.phase, None)
            yield Compared(record.id, each.phase, each.low, each.high, took)
        for phase, took in measured.items():
            if _is_estimated(phase, record.model.name):
                yield Compared(record.id, phase, None, None, took)


def _is_estimated(phase: str, model: str) -> bool:
    """Whether a phase is of a kind that estimates have: what methods time inside is not."""
    return phase.startswith(("applying ", f"{model} on ")) or phase in _ALWAYS


def accuracy_rows(records: Iterable[Record]) -> list[dict[str, object]]:
    """Return a row per kind of phase, and one for all, of phases above half a second.

    A phase counts as outside if it was not estimated, or not measured. `measured / middle` is the
    geometric mean of measured times over the geometric middle of their bounds: above 1, estimates
    are too low. `high / low` is how wide the bounds are, on the same mean. Both are of the phases
    that have proper bounds and a time, and None without any.
    """
    kinds: dict[str, list[Compared]] = defaultdict(list)
    for each in compared_phases(records):
        if each.matters:
            kinds[each.kind].append(each)
    if len(kinds) > 1:
        kinds["all"] = [each for found in list(kinds.values()) for each in found]
    return [_row(kind, found) for kind, found in kinds.items()]


def _row(kind: str, phases: list[Compared]) -> dict[str, object]:
    proper = [each for each in phases if isfinite(each.width) and each.measured]
    ratios = [
        log(each.measured / (each.low * each.high) ** 0.5)
        for each in proper
        if each.low and each.high and each.measured
    ]
    return {
        "phase": kind,
        "phases": len(phases),
        "inside": f"{100 * sum(each.inside for each in phases) / len(phases):.0f} %",
        "not estimated": sum(each.low is None for each in phases),
        "not measured": sum(each.measured is None for each in phases),
        "measured / middle": _mean(ratios, 3),
        "high / low": _mean([log(each.width) for each in proper], 2),
    }


def _mean(logarithms: list[float], digits: int) -> float | None:
    """Return the geometric mean of numbers given by their logarithms; None of none."""
    if not logarithms:
        return None
    return round(exp(sum(logarithms) / len(logarithms)), digits)
