"""Heat maps of per-layer allocation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.errors import UserError
from bench.reporting.allocation import Grid
from bench.reporting.plots.style import HEAT

CELL, FRAME = 0.3, 0.95
"""Inches: the height of a row and of everything around the rows."""
WIDTH = 7.0
WRITTEN = 24
"""The largest number of columns with numbers written into the cells."""
MOST = 16


def draw(grids: Sequence[Grid]) -> Figure:
    """Draw grids below each other, each with its own scale; lighter is more, in greyscale as well.

    Raises:
        UserError: there are more grids than fit on a page.
    """
    if len(grids) > MOST:
        raise UserError(f"at most {MOST} heat maps per page, got {len(grids)}: select fewer runs")
    # Rows have the same height in all maps, whatever the number of layers.
    heights = [len(grid.rows) * CELL + FRAME for grid in grids]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)
    for each, grid in zip(axes[:, 0], grids, strict=True):
        _map(figure, each, grid)
    return figure


def _map(figure: Figure, axes: Axes, grid: Grid) -> None:
    axes.grid(visible=False)
    most = grid.most if grid.most is not None else float(np.nanmax(grid.values))
    image = axes.imshow(grid.values, cmap=HEAT, vmin=0, vmax=most or 1, aspect="auto")
    axes.set_title(f"{grid.quantity}: {grid.title}", loc="left")
    axes.set_yticks(range(len(grid.rows)), grid.rows)
    axes.set_ylabel(grid.row_name)
    axes.set_xlabel(grid.column_name)
    long = max(map(len, grid.columns)) > 6
    if len(grid.columns) <= WRITTEN:
        axes.set_xticks(range(len(grid.columns)), grid.columns, fontsize="x-small")
        if long:
            axes.tick_params(axis="x", labelrotation=15)
        _write(axes, grid, most)
    figure.colorbar(image, ax=axes, pad=0.01, aspect=12)


def _write(axes: Axes, grid: Grid, most: float) -> None:
    for (row, column), value in np.ndenumerate(grid.values):
        if not np.isnan(value):
            # The upper part of cividis is too light for white text, the lower too dark for black.
            ink = "black" if value > 0.55 * most else "white"
            text = f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.3g}"
            axes.text(
                column, row, text if value else "0",
                ha="center", va="center", color=ink, fontsize="x-small",
            )  # fmt: skip
