"""Text of estimates: durations, one line for a sweep, and the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bench.ui import format_quantity

if TYPE_CHECKING:
    from bench.estimation.run_estimate import PhaseEstimate, RunEstimate, SweepEstimate


def duration(seconds: float) -> str:
    """Return seconds in a suitable unit."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _board(name: str) -> str:
    return "this machine" if name == "here" else name


def time_range(low: float, high: float) -> str:
    """Return the bounds of a time, with one unit if both have the same."""
    least, most = duration(low), duration(high)
    number, _, unit = least.partition(" ")
    return f"{number} to {most}" if most.endswith(f" {unit}") else f"{least} to {most}"


def sweep_line(estimate: SweepEstimate) -> str:
    """Return one line for a run or a sweep: its time, and whether it fits in memory."""
    runs, to_do = estimate.runs, estimate.to_do
    hardware = _board(runs[0].hardware.name)
    done = len(runs) - len(to_do)
    kept = f", {done} of {len(runs)} recorded already or duplicates" if done else ""
    took = time_range(estimate.low, estimate.high)
    count = f"{len(to_do)} run{'s' * (len(to_do) != 1)}"
    if not estimate.whole:
        count = "the first run" if len(to_do) == 1 else f"the first {count}"
    line = f"estimate: {count} on {hardware}, {took}{kept}"
    large = [run for run in to_do if not run.fits]
    if large:
        need = max(run.memory for run in large)
        line += f"; {len(large)} need up to {format_quantity(need)}B, more memory than there is"
    return line


def phase_rows(run: RunEstimate) -> Iterator[dict[str, object]]:
    """Yield a row per phase, followed by the parts of the phase."""
    for phase in run.phases:
        yield {
            "phase": phase.name,
            "time": time_range(phase.low, phase.high),
            "bound by": phase.bound_by,
            "memory": f"{format_quantity(phase.memory)}B",
            "tokens": _tokens(phase),
        }
        for name, part in phase.parts.items() if len(phase.parts) > 1 else ():
            yield {
                "phase": f"  {name}",
                "time": time_range(part.low, part.high),
                "bound by": part.bound_by,
                "memory": "",
                "tokens": "",
            }


def _tokens(phase: PhaseEstimate) -> str:
    if not phase.given:
        return ""
    about = "about " if phase.sampled else ""
    saved = f", {100 * phase.shared / phase.given:.0f} % shared" if phase.shared else ""
    return f"{about}{format_quantity(phase.given)}{saved}"


def notes(run: RunEstimate) -> Iterator[str]:
    """Yield the lines below the phases of a run: total, downloads, energy, missing estimates."""
    line = f"total: {time_range(run.low, run.high)} on {_board(run.hardware.name)} in {run.dtype}"
    if run.joules is not None:
        low, high = (joules / 3.6e6 for joules in run.joules)
        line += f", {low:.2g} to {high:.2g} kWh at {run.hardware.power:.0f} W"
    yield line
    if run.download is None:
        yield "the weights are not on this machine, and their size on the hub is unknown"
    elif run.download:
        yield f"download: {format_quantity(run.download)}B"
    room = f"{format_quantity(run.memory)}B of {format_quantity(run.hardware.memory)}B"
    if run.fits:
        yield f"fits in memory: {room}"
    else:
        cures = " or ".join(run.cures) or "a smaller model, or hardware with more memory"
        yield f"does not fit in memory: {room}; {cures}"
    for gap in run.missing:
        yield f"missing: {gap}"
