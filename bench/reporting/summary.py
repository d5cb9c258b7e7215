"""Table printed at the end of a run or a sweep: one column per run, the dense model first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.evaluation.metrics import AVERAGE
from bench.measurement.quantities import DECODE, FORWARD, PREFILL
from bench.records import without_real_saving
from bench.reporting.cost_table import measured_scopes, print_costs, speedup_text
from bench.reporting.record_numbers import (
    PERCENT_METRICS,
    answered_text,
    effect_text,
    metric_scale,
    scored_text,
)
from bench.reporting.terminal_tables import terminal_table, widest_fitting
from bench.ui import console, format_quantity

if TYPE_CHECKING:
    from bench.records import Cost, Metric, Record

MAX_RUNS_PER_TABLE = 7
"""Wider tables are hard to read even where the terminal is wide enough."""
PARAMETER_COUNTS = ("parameters", "nonzero_parameters")
WORK_UNITS = {
    "flops": "FLOP",
    "cache_bytes": "B in the cache",
    "seconds": "s",
    "method_seconds": "s in the method",
}
"""Costs of one forward or prefill, with their units; the scope of such a cost holds its shapes."""
HEADLINE_STAGES = (FORWARD, PREFILL, DECODE)
"""Stages whose speed-up is shown in the summary; the table of costs has all of them."""


def print_summary(records: Sequence[Record], reused: int = 0) -> None:
    """Print scores in % with standard errors, perplexities, parameters and work.

    A table of costs follows for each run in which costs were measured.

    Runs of one model that are evaluated in the same way share a table. Runs beyond the seventh, or
    beyond the width of the terminal, continue in further tables, so that no number is cut.
    """
    if not records:
        return
    out = console()
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(scored_text(record), []).append(record)
    for title, group in groups.items():
        ordered = sorted(group, key=_dense_first)
        while ordered:
            table, shown = _widest_table(title, ordered, out)
            out.print(table)
            ordered = ordered[shown:]
    for record in records:
        print_costs(record)
    out.print(f"{_outcome(records, reused)}. One run: bench show RUN; all runs: bench ls runs")


def _outcome(records: Sequence[Record], reused: int) -> str:
    """Return which runs are done, and how many of them had been recorded before."""
    if len(records) == 1:
        return f"run {records[0].id}" + (", already recorded" if reused else "")
    return f"{len(records)} runs" + (f", {reused} of them already recorded" if reused else "")


def _dense_first(record: Record) -> tuple[bool, str]:
    return (not record.is_dense, record.label)


def _widest_table(title: str, records: Sequence[Record], out: Console) -> tuple[Table, int]:
    """Return a table of as many leading records as fit, at least one, and their number."""
    most = min(len(records), MAX_RUNS_PER_TABLE)
    return widest_fitting(lambda count: _table(title, records[:count]), most, out)


def _table(title: str, records: Sequence[Record]) -> Table:
    # The ratio goes onto a second line of the heading, which keeps columns narrow.
    table = terminal_table(("\n".join(r.label.rsplit(" ", 1)) for r in records), title)
    for task, unit in _tasks(records).items():
        cells = (_metric_cell(record.metric(task)) for record in records)
        table.add_row(f"{task} {unit}", *cells, end_section=task == AVERAGE)
    table.add_section()
    for name in PARAMETER_COUNTS:
        table.add_row(
            name.replace("_", " "), *(_parameter_cell(record, name) for record in records)
        )
    for (scope, name), unit in _work_columns(records).items():
        cells = (_work_cell(record, name, scope) for record in records)
        table.add_row(f"{scope} {unit}", *cells)
    for scope in _headline_scopes(records):
        table.add_row(
            f"{scope} speed-up (of theory)", *(speedup_text(record, scope) for record in records)
        )
    table.add_row("weights", *(effect_text(record.methods) or "unchanged" for record in records))
    table.add_row("run", *(record.id[:8] for record in records))
    return table


def _tasks(records: Sequence[Record]) -> dict[str, str]:
    """Return the headline tasks with units and n in order of appearance, the average first."""
    found = [m for record in records for m in record.metrics if m.headline]
    units = {m.task: f"{m.metric}{' %' * (m.metric in PERCENT_METRICS)}, n={m.n}" for m in found}
    average = {name: unit for name, unit in units.items() if name == AVERAGE}
    return average | units


def _metric_cell(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    if metric.value is None:
        return f"-{answered_text(metric)}"
    scale, digits = metric_scale(metric.metric)
    text = f"{metric.value * scale:.{digits}f}"
    error = "" if metric.stderr is None else f" ±{metric.stderr * scale:.{digits}f}"
    return f"{text}{error}{answered_text(metric)}"


def _parameter_cell(record: Record, name: str) -> str:
    cost = record.cost(name)
    return format_quantity(cost.value if cost else None)


def _work_columns(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """Return scope and quantity of every work cost that any run has, with its unit."""
    return {
        (cost.scope, cost.quantity): WORK_UNITS[cost.quantity]
        for record in records
        for cost in record.headline_costs
        if cost.quantity in WORK_UNITS and not _is_superseded(cost, record)
    }


def _is_superseded(cost: Cost, record: Record) -> bool:
    """Whether a quick time taken while counting is superseded by a careful latency measurement."""
    return cost.quantity.endswith("seconds") and bool(record.cost("latency", cost.scope))


def _work_cell(record: Record, name: str, scope: str) -> str:
    """Format one cost; a time is not shown for runs whose weights are only masked or zeroed."""
    cost = record.cost(name, scope)
    if cost is not None and name.endswith("seconds"):
        # Masked or zeroed weights are still multiplied, so a shorter time would be noise and would
        # read as a speed-up.
        return without_real_saving(record.methods) or f"{cost.value:.4f}"
    return format_quantity(cost.value if cost else None)


def _headline_scopes(records: Sequence[Record]) -> list[str]:
    """Return the scopes whose speed-up is shown: the first shape of each headline stage."""
    scopes = list(dict.fromkeys(scope for record in records for scope in measured_scopes(record)))
    found = (next((s for s in scopes if s.startswith(stage)), None) for stage in HEADLINE_STAGES)
    return [scope for scope in found if scope is not None]
