"""Early stopping of search trials, by their result on a few early tasks.

Optuna's pruners support a single objective only. With several objectives, a trial is stopped if
another trial costs no more and is clearly better on the same early tasks: by `margin` standard
errors of the difference.
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
    """A trial after its early tasks: mean accuracy, its standard error, and costs to minimise."""

    accuracy: float
    error: float
    costs: tuple[float, ...]

    @classmethod
    def of(cls, record: Record, costs: tuple[float, ...]) -> Standing:
        """Read the record of the early tasks; without any score the accuracy is 0."""
        # A benchmark of one task has no average; its headline metric takes the place.
        average = record.metric("average")
        metric = average or next((m for m in record.metrics if m.headline), None)
        value = metric.value if metric and metric.value is not None else 0.0
        return cls(value, (metric.stderr or 0.0) if metric else 0.0, costs)

    def as_list(self) -> list[Any]:
        """Return the values as a JSON list, the inverse of `read`."""
        return [self.accuracy, self.error, list(self.costs)]

    @classmethod
    def read(cls, kept: list[Any]) -> Standing:
        """Restore what `as_list` returned."""
        return cls(kept[0], kept[1], tuple(kept[2]))


def is_hopeless(mine: Standing, rivals: Iterable[Standing], margin: float) -> bool:
    """Whether a rival costs no more and is better by more than `margin` standard errors."""
    return any(_beats(rival, mine, margin) for rival in rivals)


def _beats(rival: Standing, mine: Standing, margin: float) -> bool:
    # Both accuracies are estimates, so their errors add in quadrature. The items are the same,
    # which correlates the errors and makes this bound conservative. `lead > 0` stops a trial from
    # dominating itself when errors are 0.
    cheaper = all(a <= b for a, b in zip(rival.costs, mine.costs, strict=True))
    lead = rival.accuracy - mine.accuracy
    return cheaper and lead > 0 and lead > margin * math.hypot(rival.error, mine.error)
