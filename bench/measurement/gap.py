"""What could not be measured, and why: a marked gap instead of a zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gap:
    """One number that is not there: what of, which quantity, and the reason in a few words."""

    scope: str
    quantity: str
    reason: str
