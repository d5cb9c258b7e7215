"""Text of estimates: durations, one line for a sweep, the rows of a table, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.estimation.phases import phases_of
from bench.ui import format_quantity

if TYPE_CHECKING:
    from bench.estimation.phases import Subject
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
    first = "" if estimate.whole else "the first "
    line = f"estimate: {first}{len(to_do)} run{'s' * (len(to_do) != 1)} on {hardware}, {took}{kept}"
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


def cures(subject: Subject, run: RunEstimate) -> Iterator[str]:
    """Yield changes with which a run might fit: streaming, smaller batches, another board."""
    room = run.usable
    if subject.map is None and subject.device == "cuda":
        given = subject.config.model.model_copy(update={"device_map": "offload_cpu"})
        streamed = replace(subject, config=subject.config.model_copy(update={"model": given}))
        need = max(phase.memory for phase in phases_of(streamed))
        if need <= room:
            yield (
                f"model.device_map=offload_cpu streams one layer at a time and needs "
                f"{need / 1e9:.1f} GB; offload_disk, if the host has no "
                f"{subject.network.stored / 1e9:.0f} GB either"
            )
    over = [phase for phase in run.phases if phase.memory > room]
    names = [phase.name.removeprefix("applying ") for phase in over if phase.kind == "apply"]
    batched = [n for n in names if getattr(subject.config.method.get(n), "batch", 1) > 1]
    if batched and subject.weights * subject.copies < room:
        yield f"method.{batched[0]}.batch=1 takes fewer rows at a time"
    if subject.weights * subject.copies < room and any(p.kind == "evaluate" for p in over):
        yield "benchmark.batch_size=1, or a smaller model.max_length"
