"""Leaderboard: groups of comparable runs, each run compared with its dense model.

A setting is everything that must be equal for two runs to be compared: the weights, their dtype,
the seed of their training, and the benchmark with its limits. Each run is compared with the dense
run of its own setting, number by number, and only where the identities of the numbers match.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.records import Metric, Record, without_real_saving
from bench.records.record import AVERAGE
from bench.reporting.record_numbers import (
    PERCENT_METRICS,
    answered_text,
    distinct_labels,
    effect_text,
    headline_key,
    metric_identity,
    scored_text,
    setting_key,
    setting_names,
)

FIRST_COSTS = ("flops", "seconds", "parameters")


@dataclass(frozen=True)
class HeadlineColumn:
    """One headline number that runs of a setting have."""

    task: str
    metric: str
    filter: str
    shots: int
    percent: bool
    higher_is_better: bool


@dataclass(frozen=True)
class CostColumn:
    """One cost that runs of a setting have."""

    scope: str
    quantity: str
    unit: str


@dataclass(frozen=True)
class Setting:
    """A group of comparable runs: one model on one benchmark, evaluated in the same way."""

    name: str
    model: str
    benchmark: str
    tasks: tuple[HeadlineColumn, ...]
    costs: tuple[CostColumn, ...]

    @property
    def first_cost(self) -> int | None:
        """Position of the cost to plot first: FLOPs, else time, else parameters, else any."""
        # FLOPs before time, because they do not depend on the machine.
        quantities = [cost.quantity for cost in self.costs]
        preferred = (name for name in FIRST_COSTS if name in quantities)
        default = 0 if quantities else None
        return next((quantities.index(name) for name in preferred), default)


@dataclass(frozen=True)
class LeaderboardRow:
    """One run, with its numbers in the order of its setting's tasks and costs.

    `dense` is the id of the setting's dense run. `values` are pairs of value and standard error;
    `answered` states, for each, the number of samples if some have no answer, else it is empty.
    `retention` is the retained fraction of the dense score. `label` distinguishes the run from
    others of its setting.
    """

    record: Record
    label: str
    setting: int
    dense: str | None
    values: tuple[tuple[float, float | None] | None, ...]
    answered: tuple[str, ...]
    costs: tuple[float | None, ...]
    retention: float | None

    @property
    def family(self) -> str:
        """The methods' names without ratios; `dense` or `untrained` if there are none."""
        return self.record.family

    @property
    def effect(self) -> str:
        """The effect on weights or computation: removed, zeroed, ..., unconfirmed; or none."""
        return effect_text(self.record.methods) or "none"

    @property
    def real(self) -> bool:
        """Whether costs may be lower than the dense run's: not if zeroed, masked or unconfirmed."""
        return without_real_saving(self.record.methods) is None


@dataclass(frozen=True)
class Leaderboard:
    """All runs, newest first, and the settings to which they belong."""

    settings: tuple[Setting, ...]
    rows: tuple[LeaderboardRow, ...]


def build_leaderboard(records: Iterable[Record]) -> Leaderboard:
    """Group records into settings and compare each with the dense run of its setting."""
    groups: dict[str, list[Record]] = defaultdict(list)
    keys: dict[str, dict[str, str]] = {}
    # Newest first, so that `next` below selects the newest dense run of a setting. The key is
    # serialized because dictionaries are not hashable.
    for record in sorted(records, key=lambda r: r.started, reverse=True):
        key = setting_key(record)
        keys[text := json.dumps(key, sort_keys=True)] = key
        groups[text].append(record)
    headings = [scored_text(group[0]) for group in groups.values()]
    names = setting_names(headings, list(keys.values()))
    settings: list[Setting] = []
    rows: list[LeaderboardRow] = []
    for index, (name, group) in enumerate(zip(names, groups.values(), strict=True)):
        setting = _setting(name, group)
        settings.append(setting)
        dense = next((record for record in group if record.is_dense), None)
        labels = distinct_labels(group)
        rows += [_row(record, labels[record.id], index, setting, dense) for record in group]
    rows.sort(key=lambda row: row.record.started, reverse=True)
    return Leaderboard(tuple(settings), tuple(rows))


def _setting(name: str, group: Sequence[Record]) -> Setting:
    # Oldest first, so that the newest record wins if records disagree about a number. The average
    # is moved to the front, because the first number is the setting's score.
    tasks = {
        headline_key(m): _headline_column(m)
        for record in reversed(group)
        for m in record.metrics
        if m.headline
    }
    first = {key: column for key, column in tasks.items() if column.task == AVERAGE}
    costs = {
        (c.scope, c.quantity): CostColumn(c.scope, c.quantity, c.unit)
        for record in group
        for c in record.headline_costs
        # Phases of the wall time concern the run itself instead of the model.
        if not c.scope.startswith("phase ")
    }
    return Setting(
        name=name,
        model=group[0].model.name,
        benchmark=str(group[0].config["benchmark"]["name"]),
        tasks=tuple((first | tasks).values()),
        costs=tuple(costs.values()),
    )


def _headline_column(metric: Metric) -> HeadlineColumn:
    percent = metric.metric in PERCENT_METRICS
    return HeadlineColumn(*headline_key(metric), percent, metric.higher_is_better)


def _row(
    record: Record, label: str, index: int, setting: Setting, dense: Record | None
) -> LeaderboardRow:
    metrics = {headline_key(m): m for m in record.metrics if m.headline}
    costs = {(c.scope, c.quantity): c.value for c in record.headline_costs}
    found = [metrics.get((c.task, c.metric, c.filter, c.shots)) for c in setting.tasks]
    return LeaderboardRow(
        record=record,
        label=label,
        setting=index,
        dense=dense.id if dense else None,
        values=tuple(_value(metric) for metric in found),
        answered=tuple(answered_text(metric) if metric else "" for metric in found),
        costs=tuple(costs.get((c.scope, c.quantity)) for c in setting.costs),
        retention=_retention(record, found[0], dense) if found else None,
    )


def _value(metric: Metric | None) -> tuple[float, float | None] | None:
    return None if metric is None or metric.value is None else (metric.value, metric.stderr)


def _retention(record: Record, metric: Metric | None, dense: Record | None) -> float | None:
    """Return the retained fraction of the dense score; None if lower values are better."""
    before = dense.metric(metric.task) if dense and metric else None
    if metric is None or metric.value is None or dense is None or before is None:
        return None
    # If lower is better, the ratio would be misleading; `bench compare` inverts it instead.
    if not before.value or not metric.higher_is_better:
        return None
    if metric_identity(record, metric) != metric_identity(dense, before):
        return None
    return metric.value / before.value
