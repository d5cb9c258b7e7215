"""A saved workspace of a W&B project, whose first chart is score against cost.

W&B draws what a run logs in the order of its keys, so that a project of hundreds of runs opens on
progress bars. A workspace is a saved view: charts over the columns of `wandb_run.summary_columns`,
and a table of runs sorted by score. `wandb-workspaces` writes it, which W&B's client does not
bring along.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from bench.errors import UserError, optional_module
from bench.records.files import read_json, write_bytes
from bench.records.record import Record
from bench.schema import TrackerConfig
from bench.tracking.wandb_run import COLUMN_COSTS, summary_columns, wandb_mode

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

EXTRA = "workspace"
"""The optional dependency that installs wandb-workspaces."""
VIEWS_FILE = "wandb_home/workspaces.json"
"""Addresses of saved views, in the folder of the results that is W&B's own."""
NAME = "slimbench"
"""The name of the view in W&B."""
LABEL = "${run:displayName}"
LEADING_COLUMNS = ("method", "ratio", "effect", "score", "dense_ratio")
MAX_TASKS = 12
"""Bars of tasks; a benchmark of dozens of tasks would fill the page."""


@dataclass(frozen=True)
class ScatterPanel:
    """Columns of the runs' summaries, `y` against `x`."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class WorkspaceContent:
    """What a workspace shows: scatter plots by section, bars per task, columns of the runs."""

    sections: dict[str, tuple[ScatterPanel, ...]]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]


def workspace_content(records: Sequence[Record]) -> WorkspaceContent:
    """Return the charts and columns for which these records have numbers."""
    summaries = [summary_columns(record) for record in records]
    # `bench track` adds the ratio to the dense run, which no record knows by itself.
    known = {*(name for summary in summaries for name in summary), "dense_ratio"}
    tasks = dict.fromkeys(m.task for record in records for m in record.metrics if m.headline)
    costs = [cost for cost in COLUMN_COSTS if cost in known]
    sections = {
        "Pareto": tuple(ScatterPanel(f"score against {cost}", cost, "score") for cost in costs),
        # Models and benchmarks differ in scores and sizes; shares of the dense run do not.
        "Savings": tuple(
            ScatterPanel(f"share of the dense score against {saving}", saving, "dense_ratio")
            for saving in ("flops_saving", "bytes_saving")
            if saving in known
        ),
    }
    columns = (*(name for name in LEADING_COLUMNS if name in known), *costs)
    return WorkspaceContent(
        {name: panels for name, panels in sections.items() if panels},
        tuple(name for name in tasks if name in known)[:MAX_TASKS],
        columns,
    )


def build_workspace(content: WorkspaceContent, entity: str, project: str) -> Workspace:
    """Return the workspace as wandb-workspaces describes it; nothing is sent.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    workspaces = optional_module("wandb_workspaces.workspaces", EXTRA)
    reports = optional_module("wandb_workspaces.reports.v2", EXTRA)

    def column(name: str) -> object:
        return reports.SummaryMetric(name)

    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            pinned=name == "Pareto",
            panels=[
                reports.ScatterPlot(
                    title=panel.title, x=column(panel.x), y=column(panel.y), legend_template=LABEL
                )
                for panel in panels
            ],
        )
        for name, panels in content.sections.items()
    ]
    bars = [reports.BarPlot(title=task, metrics=[column(task)]) for task in content.tasks]
    if bars:
        sections.append(workspaces.Section(name="Tasks", is_open=False, panels=bars))
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(
            # An overview is a run of W&B without any of the columns.
            filters=[workspaces.Metric("JobType") == "run"],
            order=[workspaces.Ordering(workspaces.Summary("score"), ascending=False)],
            pinned_columns=[f"summary:{name}" for name in content.columns],
        ),
    )


def save_workspace(records: Sequence[Record], config: TrackerConfig, results_dir: Path) -> str:
    """Save the workspace of a project, over the one saved before from here; return its URL.

    Raises:
        UserError: wandb-workspaces is not installed, or W&B is offline.
        Exception: any error of W&B; the caller decides whether it matters.
    """
    if wandb_mode(config) != "online":
        raise UserError("it exists on W&B's server alone: log in, or set WANDB_MODE=online")
    import wandb

    entity = config.entity or wandb.Api().default_entity
    made = build_workspace(workspace_content(records), entity, config.project)
    saved = _saved_views(results_dir)
    before = _view(saved.get(f"{entity}/{config.project}"), entity, config.project)
    if before is not None:
        before.sections, before.runset_settings = made.sections, made.runset_settings
        made = before
    made.save()
    saved[f"{entity}/{config.project}"] = str(made.url)
    write_bytes(results_dir / VIEWS_FILE, json.dumps(saved, indent=1).encode())
    return str(made.url)


def _saved_views(results_dir: Path) -> dict[str, str]:
    """Return the addresses of the views that were saved from here, by entity and project."""
    try:
        return TypeAdapter(dict[str, str]).validate_python(read_json(results_dir / VIEWS_FILE))
    except (OSError, ValueError):
        return {}


def _view(url: str | None, entity: str, project: str) -> Workspace | None:
    """Return the view at an address, None without one or if it is gone."""
    if url is None:
        return None
    workspaces = optional_module("wandb_workspaces.workspaces", EXTRA)
    try:
        found: Workspace = workspaces.Workspace.from_url(url)
    # Somebody may have removed the view, and the address may be of another server: a new one is
    # saved.
    except Exception:
        return None
    # A results folder may come from somebody else, and name any view that this user may change.
    return found if (found.entity, found.project) == (entity, project) else None
