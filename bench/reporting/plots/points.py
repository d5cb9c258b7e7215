"""Runs as points: one row per run with a metric, its error and a cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from bench.errors import unknown
from bench.records import CostPart, MetricPart, Record, unreal
from bench.reporting.plots.families import amount, families
from bench.reporting.summary import PERCENT_METRICS

Z = 1.96
"""Half the width of a 95 % interval of a mean, in standard errors."""
SPREADS = (("least", "most"), ("p10", "p90"))
"""Names that costs give to the ends of a measured spread."""


def points(
    records: Sequence[Record],
    *,
    task: str = "average",
    cost: str | None = None,
    scope: str | None = None,
    knob: str = "ratio",
) -> pd.DataFrame:
    """Return one row per run that has the task, and the cost if one is requested.

    `value` and `error` (half of a 95 % interval) are in % if the metric is a fraction. A run of one
    task has no average and is represented by that task. Times of runs whose weights are only zeroed
    or masked are left out, since these gain no time.

    Raises:
        UserError: no run has this task, or this cost.
    """
    named = families(records, knob)
    metrics = {record.id: _headline(record, task) for record in records}
    if all(metric is None for metric in metrics.values()):
        raise unknown("task", task, {m.task for r in records for m in r.metrics if m.headline})
    rows = []
    for record in records:
        metric = metrics[record.id]
        if metric is None or metric.value is None:
            continue
        row = _row(record, metric, named[record.id], amount(record, knob))
        if cost is not None:
            found = _cost(record, cost, scope)
            # Every unit of time is stored in seconds, so "s" marks all measured times.
            if found is None or (found.unit == "s" and row["unreal"]):
                continue
            row |= _costs(found)
        rows.append(row)
    if cost is not None and not rows:
        raise unknown("cost", cost, {c.quantity for r in records for c in r.costs})
    return pd.DataFrame(rows)


def panels(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the runs of each model on each benchmark, since only these share axes."""
    for (model, benchmark), group in frame.groupby(["model", "benchmark"], sort=False):
        yield f"{model} on {benchmark}", group


def _headline(record: Record, task: str) -> MetricPart | None:
    shown = [metric for metric in record.metrics if metric.headline]
    if task == "average" and len(shown) == 1:
        return shown[0]
    return record.metric(task)


def _row(record: Record, metric: MetricPart, family: str, knob: float | None) -> dict[str, Any]:
    percent = metric.metric in PERCENT_METRICS
    factor = 100.0 if percent else 1.0
    assert metric.value is not None
    return {
        "run": record.id,
        "model": record.model.name,
        "benchmark": metric.benchmark,
        "family": family,
        "label": record.label,
        "amount": knob,
        "task": metric.task,
        "metric": f"{metric.metric} %" if percent else metric.metric,
        "higher_is_better": metric.higher_is_better,
        "value": factor * metric.value,
        "error": None if metric.stderr is None else factor * Z * metric.stderr,
        "unreal": unreal(record.methods) is not None,
    }


def _cost(record: Record, quantity: str, scope: str | None) -> CostPart | None:
    found = [c for c in record.costs if c.quantity == quantity and scope in (None, c.scope)]
    return found[0] if found else None


def _costs(cost: CostPart) -> dict[str, Any]:
    ends = next((pair for pair in SPREADS if set(pair) <= cost.parts.keys()), None)
    low, high = (cost.parts[end] for end in ends) if ends else (cost.value, cost.value)
    return {
        "cost": cost.value,
        "cost_low": low,
        "cost_high": high,
        "cost_name": f"{cost.quantity.replace('_', ' ')}, {cost.scope}",
        "unit": cost.unit,
    }
