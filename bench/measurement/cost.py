"""One number of cost, as records keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Cost:
    """One number of cost: what of, which quantity, its unit, and how it was had."""

    scope: str
    quantity: str
    unit: str
    value: float
    how: Literal["counted", "measured", "analytic"]
    parts: dict[str, float] = field(default_factory=dict)
