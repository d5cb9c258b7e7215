"""How good estimates were: measured times of recorded phases against their bounds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import exp, log
from typing import NamedTuple

from bench.records import Record

SHORTEST = 0.5
"""Seconds below which a phase is noise: it is not held against its estimate."""
_PREFIX = "phase "


class Compared(NamedTuple):
    """One phase of one record: what was estimated and what was measured, in seconds."""

    run: str
    phase: str
    low: float
    high: float
    measured: float

    @property
    def inside(self) -> bool:
        """Whether the measured time lies between the bounds."""
        return self.low <= self.measured <= self.high

    @property
    def kind(self) -> str:
        """The phase without the names of models and tasks."""
        return "evaluating" if " on " in self.phase else self.phase


def compared_phases(records: Iterable[Record]) -> Iterator[Compared]:
    """Yield the phases of records that were both estimated and measured."""
    for record in records:
        measured = {
            cost.scope.removeprefix(_PREFIX): cost.value
            for cost in record.costs
            if cost.scope.startswith(_PREFIX) and cost.quantity == "wall"
        }
        for each in record.estimate:
            if each.phase in measured:
                yield Compared(record.id, each.phase, each.low, each.high, measured[each.phase])


def accuracy_rows(records: Iterable[Record]) -> list[dict[str, object]]:
    """Return a row per kind of phase, and one for all, of phases above half a second.

    `measured / middle` is the geometric mean of measured times over the geometric middle of their
    bounds: above 1, estimates are too low. `high / low` is how wide the bounds are, on the same
    mean.
    """
    kinds: dict[str, list[Compared]] = defaultdict(list)
    for each in compared_phases(records):
        if each.measured >= SHORTEST and 0 < each.low <= each.high:
            kinds[each.kind].append(each)
    if len(kinds) > 1:
        kinds["all"] = [each for found in list(kinds.values()) for each in found]
    return [_row(kind, found) for kind, found in kinds.items()]


def _row(kind: str, found: list[Compared]) -> dict[str, object]:
    ratios = [log(each.measured / (each.low * each.high) ** 0.5) for each in found]
    widths = [log(each.high / each.low) for each in found]
    return {
        "phase": kind,
        "phases": len(found),
        "inside": f"{100 * sum(each.inside for each in found) / len(found):.0f} %",
        "measured / middle": round(exp(sum(ratios) / len(ratios)), 3),
        "high / low": round(exp(sum(widths) / len(widths)), 2),
    }
