"""One number of cost, as records keep it."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.records.record import How


@dataclass(frozen=True)
class Cost:
    """One number of cost: what of, which quantity, its unit, and how it was had.

    `parts` are the numbers that it is made of or comes with; `note` is what a reader must know
    before using it, such as that the machine was loaded.
    """

    scope: str
    quantity: str
    unit: str
    value: float
    how: How
    parts: dict[str, float] = field(default_factory=dict)
    note: str | None = None
