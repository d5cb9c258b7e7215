"""One measured figure, its goal, and how it was had."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A value that was measured just now, whether it meets its goal, and how it was measured."""

    name: str
    value: float
    goal: str
    ok: bool
    how: str

    def line(self) -> str:
        """The figure as one line for a terminal."""
        mark = "ok  " if self.ok else "MISS"
        return f"{mark} {self.name} = {self.value:.4g} (goal {self.goal}; {self.how})"
