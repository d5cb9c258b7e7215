"""Rebuild a W&B project from records: one W&B run per record and one overview of all."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from bench.errors import UserError
from bench.records import Record, Store
from bench.reporting.leaderboard import (
    HeadlineColumn,
    Leaderboard,
    LeaderboardRow,
    Setting,
    build_leaderboard,
)
from bench.reporting.tables.cell_text import line_text
from bench.reporting.tables.table import Table, TableCell
from bench.schema import TrackerConfig
from bench.tracking.tracker import track, track_overview, track_workspace
from bench.tracking.wandb_run import Overview, ScatterPlot, WandbTable

RUN_COLUMNS = (
    "run",
    "model",
    "benchmark",
    "setting",
    "method",
    "weights",
    "started",
    "score",
    "retention",
)
ANSWERED = "answered"
"""Column beside a score with the number of its samples, if answers are missing."""


def sync_all(
    store: Store,
    records: Sequence[Record],
    page: Path,
    tables: Sequence[Table] = (),
    entities: Collection[str] = (),
    *,
    workspace: bool = False,
) -> Iterator[tuple[str, str | None]]:
    """Send all records and one overview per project; yield each name and its error, if any.

    With `workspace`, a saved view of each project is sent as well. `entities` are those that the
    user allows; see `tracker_of`.
    """
    yield from sync_runs(store, records, entities)
    projects: dict[TrackerConfig, list[Record]] = defaultdict(list)
    for record in records:
        with suppress(UserError):
            projects[tracker_of(record, entities)].append(record)
    for config, group in projects.items():
        overview = build_overview(build_leaderboard(group), page, tables)
        yield f"overview of {config.project}", track_overview(overview, config, store.root)
        if workspace:
            yield f"workspace of {config.project}", track_workspace(group, config, store.root)


def sync_runs(
    store: Store, records: Sequence[Record], entities: Collection[str] = ()
) -> Iterator[tuple[str, str | None]]:
    """Send records; yield each id with one sentence if sending failed."""
    # From all records, because the dense run of a setting may not be among those to send.
    ratios = {row.record.id: row.retention for row in build_leaderboard(store.all()).rows}
    for record in records:
        try:
            config, ratio = tracker_of(record, entities), ratios.get(record.id)
            yield record.id, track(record, store, config, dense_ratio=ratio)
        except UserError as error:
            yield record.id, str(error)


def tracker_of(record: Record, entities: Collection[str] = ()) -> TrackerConfig:
    """Return where to send a record: its own tracker settings, always with kind `wandb`.

    Raises:
        UserError: the settings are invalid, or name an entity that is not allowed.
    """
    # Runs without a tracker are sent as well, because the user asks for all records in W&B.
    try:
        config = TrackerConfig(**{**record.config.get("tracker", {}), "kind": "wandb"})
    except (ValidationError, TypeError):
        raise UserError(f"run {record.id} is not sent: its tracker settings are damaged") from None
    # A record may be untrusted, and its project's overview contains all records.
    if config.entity not in (None, os.environ.get("WANDB_ENTITY"), *entities):
        raise UserError(
            f"run {record.id} is not sent: it names the W&B entity {config.entity!r}, which no "
            f"record can allow; add tracker.entity={config.entity} to this command"
        )
    return config


def build_overview(
    leaderboard: Leaderboard, page: Path | None, tables: Sequence[Table] = ()
) -> Overview:
    """Return the leaderboard, a Pareto plot per setting, and the papers' tables, as plain rows."""
    plots = (_scatter(leaderboard, index) for index in range(len(leaderboard.settings)))
    return Overview(
        leaderboard=_leaderboard_rows(leaderboard),
        pareto={plot.title: plot for plot in plots if plot is not None},
        tables={table.file: _table_rows(table) for table in tables},
        page=page,
    )


def _leaderboard_rows(leaderboard: Leaderboard) -> WandbTable:
    """Return one row per run, with a column for every headline number and cost of any setting."""
    # Settings differ in tasks and costs, but W&B requires a rectangular table: the columns are the
    # union in order of appearance, and cells without a value are empty.
    settings = leaderboard.settings
    kinds = Counter(task for task, _, _ in {_kind(c) for s in settings for c in s.tasks})
    names = [[_score_name(column, kinds) for column in setting.tasks] for setting in settings]
    incomplete = {
        name
        for row in leaderboard.rows
        for name, note in zip(names[row.setting], row.answered, strict=True)
        if note
    }
    scores = dict.fromkeys(name for named in names for name in named)
    tasks = [f"{name}{end}" for name in scores for end in _column_ends(name in incomplete)]
    costs = dict.fromkeys(
        f"{cost.quantity} of {cost.scope}" for setting in settings for cost in setting.costs
    )
    rows = []
    for row in leaderboard.rows:
        setting = settings[row.setting]
        scored: dict[str, str | float | None] = {}
        for name, value, note in zip(names[row.setting], row.values, row.answered, strict=True):
            scored |= {name: _score(value), f"{name} {ANSWERED}": note.strip() or None}
        named = (f"{cost.quantity} of {cost.scope}" for cost in setting.costs)
        spent = dict(zip(named, row.costs, strict=True))
        numbers = [*(scored.get(task) for task in tasks), *(spent.get(cost) for cost in costs)]
        rows.append([*_run_cells(row, setting), *numbers])
    return WandbTable((*RUN_COLUMNS, *tasks, *costs), rows)


def _kind(column: HeadlineColumn) -> tuple[str, str, str]:
    return column.task, column.metric, column.filter


def _score_name(column: HeadlineColumn, kinds: Mapping[str, int]) -> str:
    """Return the task, with metric and filter if settings differ in them."""
    several = kinds[column.task] > 1
    return f"{column.task} {column.metric},{column.filter}" if several else column.task


def _column_ends(incomplete: bool) -> tuple[str, ...]:
    return ("", f" {ANSWERED}") if incomplete else ("",)


def _run_cells(row: LeaderboardRow, setting: Setting) -> list[str | float | None]:
    record = row.record
    named = [record.id, setting.model, setting.benchmark, setting.name, row.label]
    score = _score(row.values[0]) if row.values else None
    return [*named, row.effect, record.started, score, row.retention]


def _score(value: tuple[float, float | None] | None) -> float | None:
    return None if value is None else value[0]


def _scatter(leaderboard: Leaderboard, index: int) -> ScatterPlot | None:
    """Return the scores of a setting's runs against its first cost; None if either is missing."""
    setting = leaderboard.settings[index]
    at = setting.first_cost
    if not setting.tasks or at is None:
        return None
    x, y = f"{setting.costs[at].quantity} of {setting.costs[at].scope}", setting.tasks[0].task
    rows = [
        [row.record.id, row.label, row.effect, row.real, row.costs[at], score]
        for row in leaderboard.rows
        if row.setting == index
        and (score := _score(row.values[0])) is not None
        and row.costs[at] is not None
    ]
    data = WandbTable(("run", "method", "weights", "real saving", x, y), rows)
    return ScatterPlot(setting.name, x, y, data) if rows else None


def _table_rows(table: Table) -> WandbTable:
    """Return one row per cell, so that W&B can filter and group by any column."""
    rows = [
        [
            line.section,
            line_text(line),
            head.text,
            head.unit,
            *_cell_values(cell),
        ]
        for line in table.lines
        for head, cell in zip(table.columns, line.cells, strict=True)
    ]
    values = ("ours", "stderr", "run", "theirs", "difference", "inside", "not subtracted")
    return WandbTable(("section", "row", "column", "unit", *values), rows)


def _cell_values(cell: TableCell) -> list[str | float | bool | None]:
    ours, theirs = cell.ours, cell.published
    own: list[str | float | None] = [None, None, None]
    if ours is not None:
        own = [ours.value, ours.stderr, next(iter(ours.runs), None)]
    return [*own, theirs.text if theirs else None, cell.difference, cell.inside, cell.refusal]
