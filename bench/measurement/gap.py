"""Missing measurement with its reason, recorded instead of a zero."""

from __future__ import annotations

from dataclasses import dataclass

from bench.records.record import How


@dataclass(frozen=True)
class Gap:
    """One missing cost: scope, quantity, and the reason in a few words.

    `how` names the method that failed if the quantity can be obtained in several ways, else None.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None
