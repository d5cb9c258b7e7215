"""Accuracy of estimates: measured times of recorded phases compared with their bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import exp, inf, isfinite, log
from typing import NamedTuple

from bench.records import Record

SHORTEST = 0.5
"""Phases shorter than this, in seconds, are noise and not compared with their estimates."""
_PREFIX = "phase "
_ALWAYS = ("counting costs", "measuring costs")
"""Phases of every run; loading is not among them, because the model may be loaded already."""


class Compared(NamedTuple):
    """One phase of one record: its estimate and its measured time, in seconds.

    Bounds are None if nothing was estimated, `measured` is None if no time was recorded.
    """

    run: str
    phase: str
    low: float | None
    high: float | None
    measured: float | None

    @property
    def inside(self) -> bool:
        """Whether the measured time is between the bounds; false if they are inverted."""
        if self.low is None or self.high is None or self.measured is None:
            return False
        return self.low <= self.measured <= self.high

    @property
    def width(self) -> float:
        """Upper bound divided by lower bound; infinite if that is 0 or a bound is not a number."""
        if self.low is None or self.high is None or not 0 < self.low <= self.high:
            return inf
        return self.high / self.low

    @property
    def matters(self) -> bool:
        """Whether the phase was, or should have been, longer than noise."""
        # Not `max`, which ignores a bound that is not a number.
        return any(not seconds < SHORTEST for seconds in (self.low, self.measured) if seconds)

    @property
    def kind(self) -> str:
        """Name of the phase without models and tasks."""
        return "evaluating" if " on " in self.phase else self.phase


def compared_phases(records: Iterable[Record]) -> Iterator[Compared]:
    """Yield the phases of records with an estimate: first the estimated ones, then the others.

    A phase with an estimate but no time, or the reverse, also counts against the estimate.
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
    """Return whether estimates have this kind of phase; phases inside a method have none."""
    return phase.startswith(("applying ", f"{model} on ")) or phase in _ALWAYS


def accuracy_rows(records: Iterable[Record]) -> list[dict[str, object]]:
    """Return a row per kind of phase, and one for all, for phases above half a second.

    A phase counts as outside if it was not estimated or not measured. `measured / middle` is the
    geometric mean of measured times divided by the geometric middle of their bounds: above 1,
    estimates are too low. `high / low` is the geometric mean width of the bounds. Both are computed
    over phases with proper bounds and a time, and None without any.
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
    """Return the geometric mean of numbers given by their logarithms, None if there are none."""
    if not logarithms:
        return None
    return round(exp(sum(logarithms) / len(logarithms)), digits)
