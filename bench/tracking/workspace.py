"""A saved workspace of a W&B project, whose first chart is score against cost.

W&B shows what a run logs in the order of its keys, so that a project of hundreds of runs opens with
progress bars. A workspace is a saved view: charts over the columns of `wandb_run.summary_columns`,
and a table of runs sorted by score. It is written with `wandb-workspaces`, which is not part of
W&B's client.
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
"""The extra that installs wandb-workspaces."""
VIEWS_FILE = "wandb_home/workspaces.json"
"""File with the addresses of saved views, in W&B's part of the results folder."""
NAME = "slimbench"
"""Name of the view in W&B."""
LABEL = "${run:displayName}"
LEADING_COLUMNS = ("method", "ratio", "effect", "score", "dense_ratio")
MAX_TASKS = 12
"""Maximum number of tasks with bars, because dozens of tasks would fill the page."""


@dataclass(frozen=True)
class ScatterPanel:
    """Columns of the runs' summaries to plot, `y` against `x`."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class WorkspaceContent:
    """Contents of a workspace: scatter plots by section, bars per task, columns of the runs."""

    sections: dict[str, tuple[ScatterPanel, ...]]
    tasks: tuple[str, ...]
    columns: tuple[str, ...]


def workspace_content(records: Sequence[Record]) -> WorkspaceContent:
    """Return the charts and columns for which these records have numbers."""
    summaries = [summary_columns(record) for record in records]
    # `bench track` adds the ratio to the dense run, which a single record does not have.
    known = {*(name for summary in summaries for name in summary), "dense_ratio"}
    tasks = dict.fromkeys(m.task for record in records for m in record.metrics if m.headline)
    costs = [cost for cost in COLUMN_COSTS if cost in known]
    sections = {
        "Pareto": tuple(ScatterPanel(f"score against {cost}", cost, "score") for cost in costs),
        # Models and benchmarks differ in scores and sizes, but ratios to the dense run are
        # comparable.
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
    """Return the workspace in the form of wandb-workspaces; nothing is sent.

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
            # An overview is a W&B run without any of the columns.
            filters=[workspaces.Metric("JobType") == "run"],
            order=[workspaces.Ordering(workspaces.Summary("score"), ascending=False)],
            pinned_columns=[f"summary:{name}" for name in content.columns],
        ),
    )


def save_workspace(records: Sequence[Record], config: TrackerConfig, results_dir: Path) -> str:
    """Save the workspace of a project, replacing an earlier one saved from here; return its URL.

    Raises:
        UserError: wandb-workspaces is not installed, or W&B is offline.
        Exception: any error of W&B; the caller decides whether it matters.
    """
    if wandb_mode(config) != "online":
        raise UserError("it exists only on W&B's server: log in, or set WANDB_MODE=online")
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
    """Return the view at an address, None if there is no address or the view no longer exists."""
    if url is None:
        return None
    workspaces = optional_module("wandb_workspaces.workspaces", EXTRA)
    try:
        found: Workspace = workspaces.Workspace.from_url(url)
    # The view may have been deleted, or the address may be of another server, so a new view is
    # saved.
    except Exception:
        return None
    # An untrusted results folder may refer to any view that this user can change.
    return found if (found.entity, found.project) == (entity, project) else None
