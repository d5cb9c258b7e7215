"""Runs as points and families of runs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeGuard

import pandas as pd

from bench.errors import UserError, unknown_name
from bench.records import AppliedMethod, Cost, Metric, Record, without_real_saving
from bench.records.record import AVERAGE
from bench.reporting.record_numbers import (
    NORMAL_QUANTILE,
    benchmark_names,
    differing_names,
    metric_scale,
    model_text,
    run_knobs,
)

COST_WORDS = {"flops": "FLOPs", "macs": "MACs", "seconds": "time", "bytes": "memory"}
"""Names of quantities for the reader of a figure."""
SPREAD_KEYS = (("least", "most"), ("p10", "p90"))
"""Names of the ends of a measured spread, as in costs."""
AMOUNT_KNOBS = frozenset({"ratio", "keep", "k", "average", "budget", "bits", "threshold", "layers"})
"""Knobs for the amount of compression, which do not change a family's colour."""


def run_points(
    records: Sequence[Record],
    *,
    task: str = AVERAGE,
    cost: str | None = None,
    scope: str | None = None,
    knob: str = "ratio",
    amounts: Collection[str] = AMOUNT_KNOBS,
) -> pd.DataFrame:
    """Return one row per run with the task, and with the cost if one is requested.

    `value` and `error` (half of a 95 % interval) are in % if the metric is a fraction. A run of one
    task has no average and is represented by that task. Times of runs whose weights are only zeroed
    or masked are left out, because these runs save no time. For `knob` and `amounts` see
    `family_names`.

    Raises:
        UserError: no run has this task or this cost, or the cost is for several shapes.
    """
    named, scored = family_names(records, knob, amounts), benchmark_names(records)
    metrics = {record.id: _headline(record, task) for record in records}
    if all(metric is None for metric in metrics.values()):
        raise unknown_name("task", task, {m.task for r in records for m in r.metrics if m.headline})
    if all(metric is None or metric.value is None for metric in metrics.values()):
        raise UserError(f"--task {task}: all runs have an empty value of it; choose another task")
    rows = []
    for record in records:
        metric = metrics[record.id]
        if metric is None or metric.value is None:
            continue
        row = _point(record, metric, knob_value(record, knob)) | {
            "family": named[record.id],
            "benchmark": scored[record.id],
        }
        if cost is not None:
            found = _cost(record, cost, scope)
            # All times are stored in seconds, so "s" identifies measured times.
            if found is None or (found.unit == "s" and row["unreal"]):
                continue
            row |= _cost_columns(found)
        rows.append(row)
    if cost is not None and not rows:
        raise _no_cost(records, cost, scope)
    frame = pd.DataFrame(rows)
    if cost is not None:
        refuse_mixed_scopes(frame, cost)
    return frame


def _no_cost(records: Sequence[Record], cost: str, scope: str | None) -> UserError:
    """Return the error for a cost that no run has, has in this scope, or may show."""
    costs = [each for record in records for each in record.headline_costs]
    scopes = dict.fromkeys(each.scope for each in costs if each.quantity == cost)
    if not scopes:
        return unknown_name("cost", cost, {each.quantity for each in costs})
    if scope is not None and scope not in scopes:
        return UserError(
            f'--scope "{scope}": no run has {cost} of it; give one of {", ".join(scopes)}'
        )
    return UserError(
        f"--cost {cost}: all runs with this cost only zero or mask weights, or have no value of "
        "the task; choose flops, or other runs"
    )


def refuse_mixed_scopes(frame: pd.DataFrame, cost: str) -> None:
    """Raise if costs of different shapes would share an axis.

    The rows have `scope`, and the runs of a panel share `model` and `benchmark`.
    """
    for _, panel in frame.groupby(["model", "benchmark"], sort=False):
        scopes = list(dict.fromkeys(panel["scope"]))
        if len(scopes) > 1:
            raise UserError(
                f"--cost {cost}: it is of several shapes ({', '.join(scopes)}): choose "
                f'one, as in --scope "{scopes[0]}", or name runs of one shape'
            )


def _headline(record: Record, task: str) -> Metric | None:
    shown = [metric for metric in record.metrics if metric.headline]
    if task == AVERAGE and len(shown) == 1:
        return shown[0]
    return record.metric(task)


def _point(record: Record, metric: Metric, knob: float | None) -> dict[str, object]:
    factor, _ = metric_scale(metric.metric)
    percent = " %" if factor == 100.0 else ""
    assert metric.value is not None
    return {
        "run": record.id,
        "model": model_text(record),
        "label": record.label,
        "amount": knob,
        "task": metric.task,
        "metric": f"{metric.metric}{percent}",
        "higher_is_better": metric.higher_is_better,
        "value": factor * metric.value,
        "error": None if metric.stderr is None else factor * NORMAL_QUANTILE * metric.stderr,
        "unreal": without_real_saving(record.methods) is not None,
    }


def _cost(record: Record, quantity: str, scope: str | None) -> Cost | None:
    same = (c for c in record.headline_costs if c.quantity == quantity)
    return next((cost for cost in same if scope in (None, cost.scope)), None)


def _cost_columns(cost: Cost) -> dict[str, object]:
    ends = next((pair for pair in SPREAD_KEYS if set(pair) <= cost.parts.keys()), None)
    low, high = (cost.parts[end] for end in ends) if ends else (cost.value, cost.value)
    return {
        "cost": cost.value,
        "cost_low": low,
        "cost_high": high,
        "cost_name": cost_name(cost),
        "scope": cost.scope,
        "unit": cost.unit,
    }


def cost_name(cost: Cost) -> str:
    """Return a name such as `FLOPs, forward 1 × 512 tokens` or `bytes of the model`."""
    quantity = COST_WORDS.get(cost.quantity, cost.quantity.replace("_", " "))
    if cost.scope == "model":
        return f"{quantity} of the model"
    # A scope such as `forward 1x512` means one row of 512 tokens.
    scope = re.sub(r"(\d+)x(\d+)", r"\1 × \2 tokens", cost.scope)
    return f"{quantity}, {scope}"


def family_names(
    records: Sequence[Record], along: str = "ratio", amounts: Collection[str] = AMOUNT_KNOBS
) -> dict[str, str]:
    """Return each run's family by run id: its methods, and the knobs in which families differ.

    The knob `along` and those in `amounts` do not separate families. If runs of a family are
    averaged, `amounts` is empty, because a mean over several amounts is meaningless.
    """
    named = {}
    for group, knobs in _alike(records, lambda run: _family_knobs(run, along, amounts)):
        for record, text in zip(group, _differences(knobs), strict=True):
            named[record.id] = record.family + text
    return named


def series_names(records: Sequence[Record]) -> dict[str, str]:
    """Return a name per run id, which is the same for runs that differ only in their seed."""
    many_models = len({record.model.name for record in records}) > 1
    named = {}
    for group, knobs in _alike(records, _knobs_beside_label):
        for record, text in zip(group, _differences(knobs), strict=True):
            model = f"{record.model.name}: " if many_models else ""
            named[record.id] = model + record.label + text
    return named


Knobs = dict[str, object]


def _alike(
    records: Sequence[Record], knobs_of: Callable[[Record], Knobs]
) -> Iterator[tuple[list[Record], list[Knobs]]]:
    """Yield groups of runs with the same methods, and the knobs that may distinguish them."""
    alike: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        alike[tuple(method.name for method in record.methods)].append(record)
    for group in alike.values():
        yield group, [knobs_of(record) for record in group]


def _differences(knobs: Sequence[Knobs]) -> list[str]:
    """Return what to add to a name: only knobs that differ, to keep legends readable."""
    shown = differing_names(knobs)
    # Knobs that are null or absent are not mentioned, because other runs of the group have them.
    return [
        "".join(f", {shown[n]}={each[n]}" for n in shown if each.get(n) is not None)
        for each in knobs
    ]


def _family_knobs(record: Record, along: str, amounts: Collection[str]) -> Knobs:
    """Return every knob of a run except the one along a curve and the amounts."""
    last, amount = along.rpartition(".")[2], knob_value(record, along)

    def moves(name: str, value: object) -> bool:
        # Several methods may use the run's ratio, which then changes together.
        return name.rpartition(".")[2] == last and amount in (None, value)

    return {
        name: value
        for name, value in run_knobs(record).items()
        if name.rpartition(".")[2] not in amounts and not moves(name, value)
    }


def _knobs_beside_label(record: Record) -> Knobs:
    """Return every knob of a run except the ratio, which is in its label."""
    knobs = run_knobs(record)
    return {name: value for name, value in knobs.items() if name.rpartition(".")[2] != "ratio"}


def knob_value(record: Record, knob: str) -> float | None:
    """Return the value of a knob of the first method that has it.

    A dotted name is a path through methods and config: `camera_p.alpha`, `calibration.rows`. Return
    None for a dense run, which has no amount, and if the knob is missing or not a number.
    """
    if not record.methods:
        return None
    if "." in knob:
        value = _value_at(record, knob)
    else:
        value = next((m.config[knob] for m in record.methods if knob in m.config), None)
    return float(value) if _is_number(value) else None


def _is_number(value: object) -> TypeGuard[int | float]:
    # True is an int in Python, but a boolean is not an amount.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value_at(record: Record, path: str) -> object:
    found: object = {**record.config, **{method.name: method.config for method in record.methods}}
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def require_knob(records: Sequence[Record], knob: str) -> None:
    """Raise unless some run has a numeric value of the knob."""
    if all(knob_value(record, knob) is None for record in records):
        known = sorted({key for r in records for m in r.methods for key in _numeric_knobs(m)})
        raise UserError(
            f"--knob {knob}: no run has a numeric value of it; numeric knobs of these methods: "
            f"{', '.join(known) or 'none'}"
        )


def _numeric_knobs(method: AppliedMethod) -> list[str]:
    return [key for key, value in method.config.items() if _is_number(value)]
