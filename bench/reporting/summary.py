"""Table printed at the end of a run or a sweep: one column per run, the dense model first."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.evaluation.metrics import averaged_headlines
from bench.measurement.quantities import DECODE, FORWARD, PREFILL
from bench.records import without_real_saving
from bench.records.record import AVERAGE
from bench.reporting.cost_table import measured_scopes, print_costs, speedup_text
from bench.reporting.record_numbers import (
    PERCENT_METRICS,
    answered_text,
    distinct_labels,
    effect_text,
    headline_key,
    metric_scale,
    scored_text,
    setting_key,
    setting_names,
)
from bench.ui import console, format_quantity, terminal_table, widest_fitting

if TYPE_CHECKING:
    from bench.records import Cost, Metric, Record

MAX_RUNS_PER_TABLE = 7
"""Wider tables are hard to read even if the terminal is wide enough."""
SIZES = ("parameters", "nonzero_parameters", "bytes")
WORK_UNITS = {
    "flops": "FLOP",
    "cache_bytes": "B in the cache",
    # Not interleaved with the dense model and possibly on a busy machine, so no basis of a claim.
    "seconds": "s, alone",
    "method_seconds": "s in the method, alone",
}
"""Costs of one forward or prefill, with their units; their scopes include shapes."""
HEADLINE_STAGES = (FORWARD, PREFILL, DECODE)
"""Stages whose speed-up is in the summary; the table of costs has all of them."""


def print_summary(records: Sequence[Record], reused: int = 0) -> None:
    """Print scores in % with standard errors, perplexities, parameters and work.

    A table of costs follows for each run with measured costs.

    Runs of one model that are evaluated in the same way share a table. A table has at most seven
    runs, or as many as fit the terminal; further runs continue in further tables.
    """
    if not records:
        return
    out = console()
    for title, group in _alike(records):
        ordered = sorted(group, key=_dense_first)
        labels = distinct_labels(ordered)
        while ordered:
            table, shown = _widest_table(title, ordered, labels, out)
            out.print(table)
            ordered = ordered[shown:]
    for record in records:
        print_costs(record)
    out.print(f"{_outcome(records, reused)}. Details: bench show RUN. All runs: bench ls runs.")


def _alike(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Return groups of runs with comparable numbers, each with a heading."""
    groups: dict[str, list[Record]] = defaultdict(list)
    keys: dict[str, dict[str, str]] = {}
    for record in records:
        # Runs with different headline metrics share a table, in which they have different rows.
        key = {name: part for name, part in setting_key(record).items() if name != "metrics"}
        plain = scored_text(record)
        keys[text := json.dumps([plain, key], sort_keys=True)] = key
        groups[text].append(record)
    plains = [scored_text(group[0]) for group in groups.values()]
    names = setting_names(plains, list(keys.values()))
    return list(zip(names, groups.values(), strict=True))


def _outcome(records: Sequence[Record], reused: int) -> str:
    """Return which runs are done, and how many of them had been recorded before."""
    if len(records) == 1:
        return f"run {records[0].id}" + (", already recorded" if reused else "")
    return f"{len(records)} runs" + (f", {reused} of them already recorded" if reused else "")


def _dense_first(record: Record) -> tuple[bool, str]:
    return (not record.is_dense, record.label)


def _widest_table(
    title: str, records: Sequence[Record], labels: Mapping[str, str], out: Console
) -> tuple[Table, int]:
    """Return a table of as many leading records as fit, at least one, and their number."""
    most = min(len(records), MAX_RUNS_PER_TABLE)
    return widest_fitting(lambda count: _table(title, records[:count], labels), most, out)


def _table(title: str, records: Sequence[Record], labels: Mapping[str, str]) -> Table:
    table = terminal_table((_heading(labels[record.id]) for record in records), title)
    for row_title, cells in _headline_rows(records):
        table.add_row(row_title, *cells, end_section=row_title.startswith(f"{AVERAGE} "))
    table.add_section()
    for name in SIZES:
        table.add_row(name.replace("_", " "), *(_size_cell(record, name) for record in records))
    for (scope, name), unit in _work_columns(records).items():
        table.add_row(f"{scope} {unit}", *(_work_cell(record, name, scope) for record in records))
    for scope in _headline_scopes(records):
        table.add_row(
            f"{scope} speed-up (of theory)", *(speedup_text(record, scope) for record in records)
        )
    table.add_row("weights", *(effect_text(record.methods) or "unchanged" for record in records))
    table.add_row("run", *(record.id[:8] for record in records))
    return table


def _heading(label: str) -> str:
    """Break a label into lines to keep columns narrow: methods, ratio, knobs that differ."""
    name, *knobs = label.split(", ")
    return "\n".join([*name.rsplit(" ", 1), *knobs])


@dataclass(frozen=True)
class _HeadlineRow:
    """Key of a row of scores; `parts` are the numbers of which an average is the mean."""

    task: str
    metric: str
    filter: str
    shots: int
    parts: frozenset[str]


def _headline_rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Return title and cells of each headline number in order of appearance, averages first."""
    found: dict[_HeadlineRow, dict[int, Metric]] = defaultdict(dict)
    for at, record in enumerate(records):
        for metric in record.metrics:
            if metric.headline:
                found[_headline_row(record, metric)][at] = metric
    ordered = sorted(found.items(), key=lambda item: item[0].task != AVERAGE)
    return [
        (
            _row_title(row, next(iter(metrics.values())), list(found)),
            [_metric_cell(metrics.get(at)) for at in range(len(records))],
        )
        for row, metrics in ordered
    ]


def _headline_row(record: Record, metric: Metric) -> _HeadlineRow:
    parts: list[Metric] = []
    if metric.task == AVERAGE:
        perplexity = record.config["benchmark"].get("perplexity", {})
        parts = averaged_headlines(record.metrics, perplexity)
    named = frozenset(f"{part.task} {part.metric},{part.filter}" for part in parts)
    return _HeadlineRow(*headline_key(metric), named)


def _row_title(row: _HeadlineRow, metric: Metric, rows: Sequence[_HeadlineRow]) -> str:
    """Return task, metric, unit and n, and what distinguishes rows of the same metric."""
    same = [other for other in rows if (other.task, other.metric) == (row.task, row.metric)]
    through = f",{row.filter}" if len({other.filter for other in same}) > 1 else ""
    percent = " %" if row.metric in PERCENT_METRICS else ""
    # A cell states the number of missing samples; the title counts all of them.
    n = metric.n if row.task == AVERAGE else metric.n + metric.missing
    shots = f", {row.shots}-shot" if len({other.shots for other in same}) > 1 else ""
    own = sorted(row.parts - frozenset.intersection(*(other.parts for other in same)))
    parts = f", with {', '.join(own)}" if own else ""
    return f"{row.task} {row.metric}{through}{percent}, n={n}{shots}{parts}"


def _metric_cell(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    if metric.value is None:
        return f"-{answered_text(metric)}"
    scale, digits = metric_scale(metric.metric)
    text = f"{metric.value * scale:.{digits}f}"
    error = "" if metric.stderr is None else f" ±{metric.stderr * scale:.{digits}f}"
    return f"{text}{error}{answered_text(metric)}"


def _size_cell(record: Record, name: str) -> str:
    cost = record.cost(name)
    return format_quantity(cost.value if cost else None)


def _work_columns(records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """Return scope and quantity of every work cost of any run, with its unit."""
    return {
        (cost.scope, cost.quantity): WORK_UNITS[cost.quantity]
        for record in records
        for cost in record.headline_costs
        if cost.quantity in WORK_UNITS and not _is_superseded(cost, record)
    }


def _is_superseded(cost: Cost, record: Record) -> bool:
    """Return whether a latency measurement replaces a time that was taken while counting."""
    return cost.quantity.endswith("seconds") and bool(record.cost("latency", cost.scope))


def _work_cell(record: Record, name: str, scope: str) -> str:
    """Format one cost; times are not shown for runs whose weights are only masked or zeroed."""
    cost = record.cost(name, scope)
    if cost is not None and name.endswith("seconds"):
        # Computations still use masked or zeroed weights, so a shorter time would be noise that
        # looks like a speed-up.
        return without_real_saving(record.methods) or f"{cost.value:.4f}"
    return format_quantity(cost.value if cost else None)


def _headline_scopes(records: Sequence[Record]) -> list[str]:
    """Return the scopes whose speed-up is shown: the first shape of each headline stage."""
    scopes = list(dict.fromkeys(scope for record in records for scope in measured_scopes(record)))
    found = (next((s for s in scopes if s.startswith(stage)), None) for stage in HEADLINE_STAGES)
    return [scope for scope in found if scope is not None]
