"""Our numbers for a table's columns, and whether the published ones are comparable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from string import Template
from typing import TYPE_CHECKING

from bench.records.record import AVERAGE
from bench.reporting.record_numbers import NORMAL_QUANTILE, data_text, metric_identity
from bench.reporting.tables.table import OurValue
from bench.reporting.tables.table_config import TableColumn

if TYPE_CHECKING:
    from bench.records import Metric, Record
    from bench.reporting.tables.published import PublishedCell

UNITS = {
    "%": ("share", 0.01), "share": ("share", 1.0), "perplexity": ("perplexity", 1.0),
    "points": ("points", 1.0), "ms": ("time", 1e-3), "s": ("time", 1.0), "min": ("time", 60.0),
    "h": ("time", 3600.0), "T": ("flops", 1e12), "FLOP": ("flops", 1.0), "count": ("count", 1.0),
    "ratio": ("ratio", 1.0),
}  # fmt: skip
"""Quantity that a unit measures, and the unit's size in the quantity's basic unit."""
IDENTITY_FIELDS = ("metric", "filter", "shots", "split", "harness")
"""Together with the task, the full identity of a number."""


def with_variables(column: TableColumn, variables: dict[str, str]) -> TableColumn:
    """Return the column with `$NAME` in its task substituted."""
    if column.task is None:
        return column
    return column.model_copy(update={"task": Template(column.task).safe_substitute(variables)})


def our_value(column: TableColumn, records: Sequence[Record]) -> OurValue | None:
    """Return a column's number over the runs of a line, or None if one of them lacks it.

    A single run has the standard error over its samples. Several runs (seeds) have the standard
    error of their mean, with Student's t for the interval, unless all scored the same network.
    """
    found = [_record_value(column, record) for record in records]
    values = [value for value, _ in filter(None, found)]
    if not values or len(values) < len(found):
        return None
    ids = tuple(record.id for record in records)
    # The seed does not change the dense model or a method without chance: the mean over such runs
    # is as uncertain as each of them, because they share their samples.
    networks = {record.provenance.get("network") for record in records}
    repeated = column.quantity is None and len(networks) == 1 and None not in networks
    if len(values) > 1 and not repeated:
        stderr: float | None = statistics.stdev(values) / math.sqrt(len(values))
        # With two or three seeds a normal interval is far too narrow: t is 12.7 and 4.3 instead of
        # the normal quantile 1.96.
        reach = _student_quantile(len(values) - 1)
    else:
        stderr, reach = next(error for _, error in filter(None, found)), NORMAL_QUANTILE
    mean = math.fsum(values) / len(values)
    metrics = (column_metric(column, record) for record in records)
    missing = 0 if column.quantity else sum(metric.missing for metric in metrics if metric)
    if stderr is None:
        return OurValue(mean, None, None, None, ids, missing)
    return OurValue(mean, stderr, mean - reach * stderr, mean + reach * stderr, ids, missing)


def _student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def _record_value(column: TableColumn, record: Record) -> tuple[float, float | None] | None:
    """Return a number of one record and its standard error, in the column's unit."""
    factor = UNITS[column.unit][1]
    if column.quantity == "method_seconds":
        # The time to apply all methods, from their reports; the cost of the same name is the time
        # spent in methods during a forward.
        return math.fsum(method.seconds for method in record.methods) / factor, None
    if column.quantity is not None:
        costs = [c for c in record.headline_costs if c.quantity == column.quantity]
        # A scope is a stage followed by its shapes. The table names the stage, and the first shape
        # is used.
        same = [cost for cost in costs if cost.scope.partition(" ")[0] == column.scope]
        return (same[0].value / factor, None) if same else None
    metric = column_metric(column, record)
    if metric is None or metric.value is None:
        return None
    error = None if metric.stderr is None else metric.stderr / factor
    return metric.value / factor, error


def change_to_dense(
    column: TableColumn, records: Sequence[Record], dense: Sequence[Record]
) -> OurValue | None:
    """Return the change of a column's number from the dense runs, seed by seed.

    The change of a cost is relative, in percent; that of any other number is a difference in the
    column's unit. Several seeds have the standard error of their mean. A single pair has none,
    because both runs share their samples and so their errors are not independent; `bench compare`
    pairs the samples. Return None if one of the runs lacks the number.
    """
    changes = []
    for run, before in zip(records, dense, strict=True):
        found, then = _record_value(column, run), _record_value(column, before)
        if found is None or then is None or (column.quantity is not None and not then[0]):
            return None
        change = found[0] - then[0]
        changes.append(change if column.quantity is None else 100 * change / then[0])
    ids = tuple(record.id for record in records)
    mean = math.fsum(changes) / len(changes)
    if len(changes) == 1:
        return OurValue(mean, None, None, None, ids)
    stderr = statistics.stdev(changes) / math.sqrt(len(changes))
    reach = _student_quantile(len(changes) - 1) * stderr
    return OurValue(mean, stderr, mean - reach, mean + reach, ids)


def unlike_dense(
    column: TableColumn, records: Sequence[Record], dense: Sequence[Record]
) -> str | None:
    """Return how the identities of a number in the runs and the dense ones differ, or None."""
    for run, before in zip(records, dense, strict=True):
        ours, theirs = column_metric(column, run), column_metric(column, before)
        if ours is None or theirs is None:
            continue
        then = metric_identity(before, theirs)
        differing = [key for key, value in metric_identity(run, ours).items() if value != then[key]]
        if differing:
            return f"the dense run has a different {differing[0]}"
    return None


def scored_on(column: TableColumn, records: Sequence[Record]) -> Iterator[str | None]:
    """Yield what each record was scored on, None for the whole real data set."""
    for record in records:
        metric = column_metric(column, record)
        if metric is None or column.task is None:
            continue
        limit = _limit(record, column.task)
        cut = None if limit is None else f"limit {limit}"
        if column.task == AVERAGE:
            name = _average_text(record, metric)
        else:
            name = data_text(record, column.task)
        # A file's name does not show which task reads it.
        if name is not None and column.task != AVERAGE and column.task not in name:
            name = f"{column.task} from {name}"
        parts = [part for part in (name or (column.task if cut else None), cut) if part]
        yield ", ".join(parts) or None


def _limit(record: Record, task: str) -> int | None:
    """Return the maximum number of samples of a task that a run scored; None if all."""
    benchmark = record.config["benchmark"]
    text = benchmark.get("perplexity", {}).get(task) or {}
    limit: int | None = text.get("windows") or benchmark.get("limit")
    return limit


def _average_text(record: Record, average: Metric) -> str | None:
    """Return the data of an average, None if they are only real data sets."""
    found = [data_text(record, m.task) for m in record.metrics if m.headline]
    replaced = [text for text in found if text]
    if not replaced:
        return None
    kind = "embedded" if all(text.startswith("embedded") for text in replaced) else "replaced"
    return f"mean of {average.n} {kind} tasks"


def column_metric(column: TableColumn, record: Record) -> Metric | None:
    """Return the metric of a record for a column."""
    same = [
        metric
        for metric in record.metrics
        if (metric.task, metric.metric, metric.filter)
        == (column.task, column.metric, column.filter)
    ]
    return same[0] if same else None


def incomparable_reason(
    column: TableColumn, records: Sequence[Record], theirs: PublishedCell
) -> str | None:
    """Return how our number and the published one differ in identity, or None.

    Parts that the source does not state do not count; `unstated_parts` lists them.
    """
    kind = UNITS[column.unit][0]
    if UNITS.get(theirs.unit, ("", 0))[0] != kind:
        return f"unit: ours {column.unit}, theirs {theirs.unit or 'not stated'}"
    for field in IDENTITY_FIELDS:
        wanted, given = getattr(column, field), getattr(theirs, field)
        # 0 shots is a value, so only an empty field and None count as not stated.
        if given not in ("", None) and given != wanted:
            return f"{field}: ours {wanted}, theirs {given}"
    for record in records:
        reason = _record_mismatch(column, record)
        if reason is not None:
            return reason
    return None


def different_images(theirs: Mapping[str, str | int], records: Sequence[Record]) -> str | None:
    """Return how image preprocessing of our runs differs from the source's, or None."""
    for record in records:
        ours = record.config.get("model", {}).get("processor") or {}
        for key, value in theirs.items():
            if ours.get(key) != value:
                given = "the processor's own" if ours.get(key) is None else ours[key]
                return f"images: ours {key} {given}, theirs {value}"
    return None


def _record_mismatch(column: TableColumn, record: Record) -> str | None:
    """Return how a record's number differs from the one that the table requires, or None."""
    metric = column_metric(column, record)
    if metric is None:
        return None
    benchmark = record.config["benchmark"]
    # Not comparable even if the identities match, because a limit is not part of the published one.
    limit = None if column.task is None else _limit(record, column.task)
    if limit is not None:
        covered = f"{limit:.0%} of the" if isinstance(limit, float) else f"the first {limit}"
        return f"ours covers only {covered} samples"
    if metric.missing:
        return f"ours leaves out {metric.missing} samples without an answer"
    if column.of is not None and metric.n != column.of:
        return f"ours is the mean of {metric.n} tasks, not of {column.of}"
    given = {"shots": metric.shots, "split": metric.split, "harness": benchmark.get("harness")}
    for field, value in given.items():
        wanted = getattr(column, field)
        if wanted not in ("", None) and value != wanted:
            return f"{field}: ours {value}, the table's {wanted}"
    return None


def unstated_parts(column: TableColumn, theirs: PublishedCell) -> list[str]:
    """Return the parts of the identity that the table states but the source does not."""
    unstated = [field for field in IDENTITY_FIELDS if getattr(theirs, field) in ("", None)]
    return [f"{f} {getattr(column, f)}" for f in unstated if getattr(column, f) not in ("", None)]


def convert_unit(theirs: PublishedCell, unit: str) -> float:
    """Return the published number in another unit of the same quantity."""
    return float(theirs.value) * UNITS[theirs.unit][1] / UNITS[unit][1]
