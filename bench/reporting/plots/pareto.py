"""Pareto-optimal runs and their fronts."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bench.reporting.plots.style import (
    GREY,
    SeriesStyle,
    add_legend,
    draw_panels,
    family_handles,
    label_metric_axis,
    label_unit_axis,
    series_styles,
    zeroed_handle,
)


def draw_fronts(frame: pd.DataFrame) -> Figure:
    """Draw the rows of `run_points(cost=...)`; a grey step line is the Pareto front.

    Bars are 95 % intervals of the metric, and the spread of a measured cost.
    """
    families = series_styles(frame["family"])
    figure, _ = draw_panels(frame, lambda axes, rows: _draw_front_panel(axes, rows, families))
    unreal = [zeroed_handle()] if frame["unreal"].any() else []
    add_legend(figure, [*family_handles(families, joined=False), *unreal])
    return figure


def _draw_front_panel(axes: Axes, group: pd.DataFrame, families: dict[str, SeriesStyle]) -> None:
    first = group.iloc[0]
    # A run whose weights are only zeroed or masked does not really have its counted cost, so it
    # must not dominate other runs.
    front = pareto_front(group[~group["unreal"]], higher_is_better=bool(first["higher_is_better"]))
    # Steps, as in the report: nothing better than the cheaper run is known between two runs. Pale
    # and behind everything else, because the line is a guide and not a measurement.
    axes.step(
        front["cost"], front["value"], where="post", color=GREY, linewidth=3, alpha=0.5, zorder=1
    )
    # A step leaves its run to the right and reaches it from the worse side, so the corner to the
    # left on the better side has no lines.
    better = 1 if first["higher_is_better"] else -1
    for _, row in group.iterrows():
        look = families[row["family"]]
        axes.errorbar(
            row["cost"],
            row["value"],
            yerr=None if pd.isna(row["error"]) else row["error"],
            xerr=[[row["cost"] - row["cost_low"]], [row["cost_high"] - row["cost"]]],
            color=look.colour,
            marker=look.marker,
            # A star of the same size looks much smaller than the other markers.
            markersize=11 if look.marker == "*" else None,
            markerfacecolor="white" if row["unreal"] else look.colour,
            elinewidth=0.8,
        )
        # Hollow points have no label: their cost is not real, and more labels would overlap.
        if not pd.isna(row["amount"]) and not row["unreal"]:
            axes.annotate(
                f"{row['amount']:g}",
                (row["cost"], row["value"]),
                xytext=(-5, 4 * better),
                textcoords="offset points",
                ha="right",
                va="bottom" if better > 0 else "top",
                fontsize="small",
                color=look.colour,
                # If runs are close to each other, a label remains readable on another run's bar.
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
    # Space for the label of the cheapest run, to its left.
    axes.margins(x=0.12)
    label_unit_axis(axes, first["cost_name"], first["unit"], group["cost"].max())
    higher = bool(first["higher_is_better"])
    label_metric_axis(axes, first["metric"], first["task"], higher_is_better=higher)


def pareto_front(
    frame: pd.DataFrame, cost: str = "cost", value: str = "value", *, higher_is_better: bool = True
) -> pd.DataFrame:
    """Return the rows that no other row dominates, cheapest first.

    A row dominates another if it costs no more and is no worse, and is strictly better in at least
    one of them. Rows equal in both do not dominate each other. Rows without a cost or a value are
    dropped. `cost` and `value` name numeric columns; a lower cost is better.
    """
    known = frame.dropna(subset=[cost, value])
    ranked = known.sort_values([cost, value], ascending=[True, not higher_is_better], kind="stable")
    # If sorted by cost and then by value, a row is on the front exactly if it is better than every
    # earlier row. Rows equal in both get the result of the first of them, because compared with
    # each other, only the first one would be on the front.
    worth = ranked[value] if higher_is_better else -ranked[value]
    best_before = worth.cummax().shift(fill_value=-float("inf"))
    alike = [ranked[cost], ranked[value]]
    return ranked[(worth > best_before).groupby(alike).transform("first")]
