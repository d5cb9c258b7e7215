"""One cost of a model, with the fields that a record stores."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.records.record import How


@dataclass(frozen=True)
class Cost:
    """One cost: what it is a cost of (`scope`), quantity, unit, value, and how it was obtained.

    `parts` holds its components or accompanying numbers; `note` is a caveat for the reader, such as
    a loaded machine.
    """

    scope: str
    quantity: str
    unit: str
    value: float
    how: How
    parts: dict[str, float] = field(default_factory=dict)
    note: str | None = None
