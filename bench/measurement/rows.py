"""Costs and missing measurements as they are produced, and collected for a record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from bench.measurement.cost import Cost
from bench.measurement.gap import Gap

Rows: TypeAlias = "Iterator[Cost | Gap]"


@dataclass
class Found:
    """Costs that were obtained, and measurements that are missing."""

    costs: list[Cost] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    def add(self, rows: Iterable[Cost | Gap]) -> None:
        """Sort each row into `costs` or `gaps`, in the order given."""
        for row in rows:
            if isinstance(row, Cost):
                self.costs.append(row)
            else:
                self.gaps.append(row)
