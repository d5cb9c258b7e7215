"""What a project shows beside its runs: the leaderboard, Pareto plots, papers' tables, the report.

One W&B run of the type `overview` holds it. W&B lays panels out in sections by what stands before
the first `/` of a key, so the keys alone give the layout that a report is written from:

    leaderboard/runs     every run with its numbers, sortable and filterable in W&B
    pareto/<setting>     a scatter plot of score against cost, with its data
    tables/<name>        a paper's table, ours and theirs
    report/page          the HTML report itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.tracking.config import TrackerConfig
from bench.tracking.wandb import opened


@dataclass(frozen=True)
class Rows:
    """A table: columns and rows of plain values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | bool | None]]


@dataclass(frozen=True)
class Scatter:
    """A scatter plot of two columns of its rows."""

    title: str
    x: str
    y: str
    data: Rows


@dataclass(frozen=True)
class Overview:
    """All that the overview of a project holds; names are unique within each part."""

    leaderboard: Rows
    pareto: dict[str, Scatter] = field(default_factory=dict)
    tables: dict[str, Rows] = field(default_factory=dict)
    page: Path | None = None


def send_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str:
    """Log the overview as a run of its own; returns where W&B keeps it.

    Raises:
        Exception: whatever W&B raises; the caller decides that it does not matter.
    """
    with opened(config, results_dir, name="overview", job_type="overview") as (wandb, run, kept):
        run.log({"leaderboard/runs": _table(wandb, overview.leaderboard)})
        for name, plot in overview.pareto.items():
            drawn = wandb.plot.scatter(_table(wandb, plot.data), plot.x, plot.y, title=plot.title)
            run.log({f"pareto/{name}": drawn})
        for name, rows in overview.tables.items():
            run.log({f"tables/{name}": _table(wandb, rows)})
        if overview.page is not None:
            run.log({"report/page": wandb.Html(overview.page.read_text("utf-8"), inject=False)})
    return kept


def _table(wandb: Any, rows: Rows) -> Any:
    """Return W&B's table; columns may hold missing values."""
    return wandb.Table(
        columns=list(rows.columns), data=[list(row) for row in rows.rows], allow_mixed_types=True
    )
