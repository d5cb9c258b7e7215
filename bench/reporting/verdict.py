"""Verdict of `bench verify`, and its output."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.reporting.terminal import console


@dataclass(frozen=True)
class Verdict:
    """Result of repeating a part of a run: samples per task, and which numbers differ.

    `worst` is the largest relative difference. `faults` describes, one sentence each, every number
    that differs by more than `tolerance`. `changed` lists versions and devices that differ from the
    run's, which is not a fault by itself.
    """

    run: str
    tasks: dict[str, int]
    numbers: int
    tolerance: float
    worst: float
    faults: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every number is within the tolerance."""
        return not self.faults

    def plain(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {"agrees": self.agrees, **asdict(self)}


SHOWN = 5


def print_verdict(verdict: Verdict) -> None:
    """Print whether the run agrees, within which tolerance, and where it does not."""
    out = console()
    samples = ", ".join(f"{task} {count}" for task, count in verdict.tasks.items())
    out.print(f"run {verdict.run}, samples repeated: {samples}")
    for change in verdict.changed:
        # Texts from records and models may contain square brackets, which rich would take for
        # markup.
        out.print(f"changed since the run: {change}", markup=False)
    for fault in verdict.faults[:SHOWN]:
        # A broken environment makes every number differ; a few faults are enough to see the
        # pattern.
        out.print(f"differs: {fault}", markup=False)
    if len(verdict.faults) > SHOWN:
        out.print(f"and {len(verdict.faults) - SHOWN} more")
    said = "[bold]agrees[/bold]" if verdict.agrees else "[bold]does not agree[/bold]"
    out.print(
        f"{said}: {verdict.numbers} numbers, relative tolerance {verdict.tolerance:g} (absolute "
        f"below 1), largest difference {verdict.worst:.2g}"
    )
