"""Pareto fronts: a metric against a cost."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.reporting.pareto import pareto
from bench.reporting.plots.axes import (
    hollow,
    legend,
    metric_axis,
    of_families,
    side_by_side,
    unit_axis,
)
from bench.reporting.plots.points import panels
from bench.reporting.plots.style import PALE, Look, looks


def draw(frame: pd.DataFrame) -> Figure:
    """Draw the rows of `points(cost=...)`; a grey line joins the Pareto-optimal ones.

    Bars are 95 % intervals of the metric, and the spread of a measured cost.
    """
    shown = list(panels(frame))
    figure, axes = side_by_side([name for name, _ in shown])
    families = looks(frame["family"])
    for each, (_, group) in zip(axes, shown, strict=True):
        _panel(each, group, families)
    unreal = [hollow()] if frame["unreal"].any() else []
    legend(figure, [*of_families(families, joined=False), *unreal])
    return figure


def _panel(axes: Axes, group: pd.DataFrame, families: dict[str, Look]) -> None:
    first = group.iloc[0]
    front = pareto(group, higher_is_better=bool(first["higher_is_better"]))
    # Below everything else and pale: the line is a guide to the eye, not a measurement.
    axes.plot(front["cost"], front["value"], color=PALE, linewidth=3, alpha=0.5, zorder=1)
    for _, row in group.iterrows():
        look = families[row["family"]]
        axes.errorbar(
            row["cost"],
            row["value"],
            yerr=None if pd.isna(row["error"]) else row["error"],
            xerr=[[row["cost"] - row["cost_low"]], [row["cost_high"] - row["cost"]]],
            color=look.colour,
            marker=look.marker,
            # A star of the common size looks much smaller than the other markers.
            markersize=11 if look.marker == "*" else None,
            markerfacecolor="white" if row["unreal"] else look.colour,
            elinewidth=0.8,
        )
        # Hollow points carry no label: their cost is not real, and more labels would overlap.
        if not pd.isna(row["amount"]) and not row["unreal"]:
            axes.annotate(
                f"{row['amount']:g}",
                (row["cost"], row["value"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize="x-small",
                color=look.colour,
            )
    unit_axis(axes, first["cost_name"], first["unit"], group["cost"].max())
    metric_axis(axes, first["metric"], first["task"], bool(first["higher_is_better"]))
