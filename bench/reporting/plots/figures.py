"""Figures by kind: from the runs that a user names to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.errors import UserError, refuse_bare_text, unknown_name
from bench.records import Record, Store, samples
from bench.records.record import AVERAGE
from bench.reporting.comparison import ComparedRun
from bench.reporting.plots import allocation, breakdown, calibration_curves, curves, pareto
from bench.reporting.plots.points import require_knob, run_points
from bench.reporting.plots.style import FIGURE_FORMATS, plot_settings, save_figure
from bench.reporting.record_numbers import benchmark_text
from bench.ui import warn


@dataclass(frozen=True)
class PlotRequest:
    """Options of a figure; each kind of plot reads only its own."""

    results_dir: Path
    task: str = AVERAGE
    cost: str = "flops"
    scope: str | None = None
    knob: str = "ratio"


@dataclass(frozen=True)
class PreparedFigure:
    """The data of a figure and the function that draws it."""

    data: pd.DataFrame
    draw: Callable[[], Figure]

    def rows(self) -> list[dict[str, object]]:
        """Return the data as JSON values."""
        # With pandas' own JSON, which converts NaN to null and numpy numbers to plain ones.
        found: list[dict[str, object]] = json.loads(self.data.to_json(orient="records"))
        return found


def prepare_figure(kind: str, runs: Sequence[str], request: PlotRequest) -> PreparedFigure:
    """Prepare a figure of the named runs, or of all recorded runs.

    Raises:
        UserError: the kind or a run is unknown, or the runs have no data for this kind.
    """
    refuse_bare_text("runs", runs, 'bench.plot("front", ["1a2b", "3c4d"])')
    if kind not in PLOT_KINDS:
        raise unknown_name("kind of plot", kind, PLOT_KINDS)
    store = Store(request.results_dir)
    records = list(map(store.get, runs)) if runs else store.all()
    if not records:
        raise UserError(f"nothing to plot: there are no runs in {store.runs}")
    return PLOT_KINDS[kind](sorted(records, key=_plot_order), request)


def _plot_order(record: Record) -> tuple[str, str, bool, str]:
    """Order runs by panel, the dense model first, then by label."""
    # Styles are assigned in this order and consecutive styles differ most, so that neighbours in a
    # legend are easy to distinguish.
    return record.model.name, benchmark_text(record), not record.is_dense, record.label


def figure_files(kind: str, outputs: Sequence[Path], results_dir: Path) -> list[Path]:
    """Return the given files, or one per format at `RESULTS/plots/KIND.*`."""
    return list(outputs) or [
        results_dir / "plots" / f"{kind}.{suffix}" for suffix in FIGURE_FORMATS
    ]


def write_figures(
    prepared: PreparedFigure, kind: str, outputs: Sequence[Path], results_dir: Path
) -> list[Path]:
    """Write a figure to the files from `figure_files`, which have been checked."""
    paths = figure_files(kind, outputs, results_dir)
    # matplotlib applies settings when artists are created, so the figure must also be drawn within
    # the context.
    with plot_settings():
        figure = prepared.draw()
        for path in paths:
            save_figure(figure, path)
    return paths


def _front(records: list[Record], request: PlotRequest) -> PreparedFigure:
    found = run_points(
        records, task=request.task, cost=request.cost, scope=request.scope, knob=request.knob
    )
    return PreparedFigure(found, lambda: pareto.draw_fronts(found))


def _curves(records: list[Record], request: PlotRequest) -> PreparedFigure:
    require_knob(records, request.knob)
    points = run_points(records, task=request.task, knob=request.knob, amounts=())
    found = curves.summarize_families(points)
    return PreparedFigure(found, lambda: curves.draw_curves(found, request.knob))


def _allocation(records: list[Record], request: PlotRequest) -> PreparedFigure:
    found = allocation.allocation_grids(records)
    if not found:
        raise UserError("none of the runs has a method that reports per-layer results")
    cells = [
        {"title": grid.title, "quantity": grid.quantity, "row": row, "column": column, "value": v}
        for grid in found
        for row, line in zip(grid.rows, grid.values.tolist(), strict=True)
        for column, v in zip(grid.columns, line, strict=True)
    ]
    return PreparedFigure(pd.DataFrame(cells), lambda: allocation.draw_allocation(found))


def _breakdown(records: list[Record], request: PlotRequest) -> PreparedFigure:
    found = breakdown.cost_parts(records, request.cost, request.scope)
    return PreparedFigure(found, lambda: breakdown.draw_breakdown(found))


def _calibration(records: list[Record], request: PlotRequest) -> PreparedFigure:
    read: list[ComparedRun] = []
    faults: list[UserError] = []
    for record in records:
        try:
            read.append(ComparedRun(record, samples(record.id, request.results_dir)))
        except UserError as error:
            faults.append(error)
    # Damaged samples of one run must not prevent a figure of the others.
    if faults and not read:
        raise faults[0]
    for fault in faults:
        warn(str(fault))
    found = calibration_curves.confidence_curves(read)
    return PreparedFigure(found, lambda: calibration_curves.draw_calibration(found))


def _training(records: list[Record], request: PlotRequest) -> PreparedFigure:
    found = curves.training_histories(records)
    return PreparedFigure(found, lambda: curves.draw_training(found))


PLOT_KINDS: dict[str, Callable[[list[Record], PlotRequest], PreparedFigure]] = {
    "front": _front,
    "curves": _curves,
    "allocation": _allocation,
    "breakdown": _breakdown,
    "calibration": _calibration,
    "training": _training,
}
