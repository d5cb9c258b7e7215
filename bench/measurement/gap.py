"""What could not be had, and why: a marked gap instead of a zero."""

from __future__ import annotations

from dataclasses import dataclass

from bench.records.record import How


@dataclass(frozen=True)
class Gap:
    """One number that is not there: what of, which quantity, and the reason in a few words.

    `how` says which way failed where a number can be had in several, None where there is one.
    """

    scope: str
    quantity: str
    reason: str
    how: How | None = None
