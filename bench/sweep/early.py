"""Which trials of a search are hopeless after their early tasks.

Optuna's pruners know one objective only; with several, a trial is hopeless when another one costs
no more and is clearly better on the same early tasks: by `margin` standard errors of their
difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.records import Record


@dataclass(frozen=True)
class Standing:
    """A trial after its early tasks: mean accuracy with its standard error, and its costs."""

    accuracy: float
    error: float
    costs: tuple[float, ...]

    @classmethod
    def of(cls, record: Record, costs: tuple[float, ...]) -> Standing:
        """Read the standing off the record of the early tasks; nothing scored stands at zero."""
        average = record.metric("average")
        metric = average or next((m for m in record.metrics if m.headline), None)
        value = metric.value if metric and metric.value is not None else 0.0
        return cls(value, (metric.stderr or 0.0) if metric else 0.0, costs)

    def as_list(self) -> list[Any]:
        """Return JSON values."""
        return [self.accuracy, self.error, list(self.costs)]

    @classmethod
    def read(cls, kept: list[Any]) -> Standing:
        """Turn the JSON values back."""
        return cls(kept[0], kept[1], tuple(kept[2]))


def is_hopeless(mine: Standing, rivals: Iterable[Standing], margin: float) -> bool:
    """Whether some rival costs no more and is better by `margin` standard errors."""
    return any(_beats(rival, mine, margin) for rival in rivals)


def _beats(rival: Standing, mine: Standing, margin: float) -> bool:
    cheaper = all(a <= b for a, b in zip(rival.costs, mine.costs, strict=True))
    lead = rival.accuracy - mine.accuracy
    return cheaper and lead > 0 and lead > margin * math.hypot(rival.error, mine.error)
