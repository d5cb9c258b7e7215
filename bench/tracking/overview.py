"""Overview of a W&B project: leaderboard, Pareto plots, paper tables and the HTML report.

One W&B run of job type `overview` holds it. W&B groups panels into sections by the part of a key
before the first `/`, so the keys alone define the layout:

    leaderboard/runs     every run with its numbers, sortable and filterable in W&B
    pareto/<setting>     a scatter plot of score against cost, with its data
    tables/<name>        a paper's table: our values and the published ones
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
    """A table of plain values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | bool | None]]


@dataclass(frozen=True)
class Scatter:
    """A scatter plot of columns `x` and `y` of `data`."""

    title: str
    x: str
    y: str
    data: Rows


@dataclass(frozen=True)
class Overview:
    """Contents of a project's overview; names are unique within each part."""

    leaderboard: Rows
    pareto: dict[str, Scatter] = field(default_factory=dict)
    tables: dict[str, Rows] = field(default_factory=dict)
    page: Path | None = None


def send_overview(overview: Overview, config: TrackerConfig, results_dir: Path) -> str:
    """Log the overview as a separate W&B run; return its URL or folder.

    Raises:
        Exception: any error of W&B; the caller decides whether it matters.
    """
    # No run id is given, so every overview is a new W&B run; the latest one is current.
    with opened(config, results_dir, name="overview", job_type="overview") as (wandb, run, kept):
        run.log({"leaderboard/runs": _table(wandb, overview.leaderboard)})
        for name, plot in overview.pareto.items():
            drawn = wandb.plot.scatter(_table(wandb, plot.data), plot.x, plot.y, title=plot.title)
            run.log({f"pareto/{name}": drawn})
        for name, rows in overview.tables.items():
            run.log({f"tables/{name}": _table(wandb, rows)})
        if overview.page is not None:
            # `inject` would add W&B's own style sheet to the page.
            run.log({"report/page": wandb.Html(overview.page.read_text("utf-8"), inject=False)})
    return kept


def _table(wandb: Any, rows: Rows) -> Any:
    # Columns may hold missing values next to numbers or text, so their types are mixed.
    return wandb.Table(
        columns=list(rows.columns), data=[list(row) for row in rows.rows], allow_mixed_types=True
    )
