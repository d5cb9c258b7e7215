"""Handler of `bench plot`: from the named runs to figures in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.errors import UserError, unknown
from bench.records import Record, Store, samples
from bench.reporting import allocation as where
from bench.reporting.comparison import Run
from bench.reporting.plots import breakdown, curves, fronts, heat, reliability, training
from bench.reporting.plots.families import refuse_without
from bench.reporting.plots.points import points
from bench.reporting.plots.style import FORMATS, drawing, save


@dataclass(frozen=True)
class Asked:
    """Options of a figure; each kind of plot reads those that concern it."""

    results_dir: Path
    task: str = "average"
    cost: str = "flops"
    scope: str | None = None
    knob: str = "ratio"


@dataclass(frozen=True)
class Drawing:
    """The data of a figure and the function that draws it."""

    data: pd.DataFrame
    draw: Callable[[], Figure]

    def rows(self) -> list[dict[str, Any]]:
        """Return the data as JSON values."""
        # Through pandas' own JSON, which turns NaN into null and numpy numbers into plain ones.
        found: list[dict[str, Any]] = json.loads(self.data.to_json(orient="records"))
        return found


def plot(kind: str, runs: Sequence[str], asked: Asked) -> Drawing:
    """Prepare a figure of the named runs, or of all recorded runs.

    Raises:
        UserError: the kind or a run is unknown, or the runs have no data for this kind.
    """
    if kind not in KINDS:
        raise unknown("kind of plot", kind, KINDS)
    store = Store(asked.results_dir)
    records = list(map(store.get, runs)) if runs else store.all()
    if not records:
        raise UserError(f"nothing to plot: there are no runs in {store.runs}")
    return KINDS[kind](sorted(records, key=_order), asked)


def _order(record: Record) -> tuple[str, str, bool, str]:
    """Order runs by panel, the dense model first, then by label."""
    # Styles are assigned in this order, and consecutive ones differ most, so that neighbours in a
    # legend do not look alike.
    benchmark = str(record.config["benchmark"]["name"])
    return record.model.name, benchmark, bool(record.methods), record.label


def write(drawing_of: Drawing, kind: str, outputs: Sequence[Path], results_dir: Path) -> list[Path]:
    """Write a figure to the given files, or in every format to `RESULTS/plots/KIND.*`."""
    paths = list(outputs) or [results_dir / "plots" / f"{kind}.{suffix}" for suffix in FORMATS]
    # matplotlib applies its settings when artists are created, so the figure is drawn, and not only
    # saved, within the context.
    with drawing():
        figure = drawing_of.draw()
        for path in paths:
            save(figure, path)
    return paths


def _front(records: list[Record], asked: Asked) -> Drawing:
    found = points(records, task=asked.task, cost=asked.cost, scope=asked.scope, knob=asked.knob)
    return Drawing(found, lambda: fronts.draw(found))


def _curves(records: list[Record], asked: Asked) -> Drawing:
    refuse_without(records, asked.knob)
    found = curves.summarised(points(records, task=asked.task, knob=asked.knob))
    return Drawing(found, lambda: curves.draw(found, asked.knob))


def _allocation(records: list[Record], asked: Asked) -> Drawing:
    found = where.grids(records)
    if not found:
        raise UserError("none of the runs has a method that reports per-layer results")
    cells = [
        {"title": grid.title, "quantity": grid.quantity, "row": row, "column": column, "value": v}
        for grid in found
        for row, line in zip(grid.rows, grid.values.tolist(), strict=True)
        for column, v in zip(grid.columns, line, strict=True)
    ]
    return Drawing(pd.DataFrame(cells), lambda: heat.draw(found))


def _breakdown(records: list[Record], asked: Asked) -> Drawing:
    found = breakdown.parts(records, asked.cost, asked.scope)
    return Drawing(found, lambda: breakdown.draw(found))


def _calibration(records: list[Record], asked: Asked) -> Drawing:
    found = reliability.curves([Run(r, samples(r.id, asked.results_dir)) for r in records])
    return Drawing(found, lambda: reliability.draw(found))


def _training(records: list[Record], asked: Asked) -> Drawing:
    found = training.histories(records)
    return Drawing(found, lambda: training.draw(found))


KINDS: dict[str, Callable[[list[Record], Asked], Drawing]] = {
    "front": _front,
    "curves": _curves,
    "allocation": _allocation,
    "breakdown": _breakdown,
    "calibration": _calibration,
    "training": _training,
}
