"""The rows that a meter yields, and all of a record's together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from bench.measurement.cost import Cost
from bench.measurement.gap import Gap

Rows: TypeAlias = "Iterator[Cost | Gap]"


@dataclass
class Found:
    """What was had, and what was not."""

    costs: list[Cost] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def add(self, rows: Iterable[Cost | Gap]) -> None:
        """Take in rows as they come."""
        for row in rows:
            if isinstance(row, Cost):
                self.costs.append(row)
            else:
                self.gaps.append(row)
