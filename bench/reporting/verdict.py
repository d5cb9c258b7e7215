"""What `bench verify` found, and how it is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.reporting.terminal import console


@dataclass(frozen=True)
class Verdict:
    """A part of a run, repeated: how many samples, and which numbers are others now.

    `worst` is the largest relative difference of a number. `faults` says in a sentence each what
    differs by more than `tolerance`; `changed` lists versions and devices that are others now,
    which is no fault by itself.
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
    """Say whether the run agrees, within which tolerance, and where it does not."""
    out = console()
    samples = ", ".join(f"{task} {count}" for task, count in verdict.tasks.items())
    out.print(f"run {verdict.run}, samples again: {samples}")
    for change in verdict.changed:
        out.print(f"since the run: {change}", markup=False)
    for fault in verdict.faults[:SHOWN]:
        out.print(f"differs: {fault}", markup=False)
    if len(verdict.faults) > SHOWN:
        out.print(f"and {len(verdict.faults) - SHOWN} more")
    said = "[bold]agrees[/bold]" if verdict.agrees else "[bold]does not agree[/bold]"
    out.print(
        f"{said}: {verdict.numbers} numbers, tolerance {verdict.tolerance:g} of a number (of 1 at "
        f"least), largest difference {verdict.worst:.2g}"
    )
