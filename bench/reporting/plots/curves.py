"""Curves of a metric against a knob, one line per family."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.reporting.plots.axes import legend, metric_axis, of_families, side_by_side
from bench.reporting.plots.points import panels
from bench.reporting.plots.style import DENSE, Look, looks


def summarised(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per family and amount: the mean of its runs and an error bar.

    The bar of a single run is its 95 % interval; that of several runs (seeds) spans their minimum
    and maximum, and `runs` holds their number.
    """
    rows = []
    keys = ["model", "benchmark", "family", "amount"]
    # dropna=False: the dense model has no amount, and pandas would drop its group.
    for key, group in frame.groupby(keys, sort=False, dropna=False):
        mean, low, high = group["value"].mean(), group["value"].min(), group["value"].max()
        error = group["error"].iloc[0]
        if len(group) == 1 and not pd.isna(error):
            low, high = mean - error, mean + error
        named = dict(zip(keys, key, strict=True))
        kept = group.iloc[0][["task", "metric", "higher_is_better"]]
        numbers = {"value": mean, "low": low, "high": high, "runs": len(group)}
        rows.append({**named, **kept, **numbers})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame, knob: str) -> Figure:
    """Draw the rows of `summarised`; the dense model is a horizontal line with its interval."""
    shown = list(panels(frame))
    figure, axes = side_by_side([name for name, _ in shown])
    # Families without a value of the knob are not drawn and must use up no style.
    with_amount = frame[frame["amount"].notna() | (frame["family"] == "dense")]
    families = looks(with_amount["family"])
    for each, (_, group) in zip(axes, shown, strict=True):
        _panel(each, group, families, knob)
    legend(figure, of_families(families, joined=True))
    return figure


def _panel(axes: Axes, group: pd.DataFrame, families: dict[str, Look], knob: str) -> None:
    for family, line in group.groupby("family", sort=False):
        if family == "dense":
            _dense(axes, line.iloc[0])
            continue
        known = line.dropna(subset=["amount"]).sort_values("amount")
        if known.empty:
            continue
        look = families[str(family)]
        axes.errorbar(
            known["amount"],
            known["value"],
            yerr=[known["value"] - known["low"], known["high"] - known["value"]],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            elinewidth=0.8,
        )
    first = group.iloc[0]
    axes.set_xlabel(knob.replace("_", " "))
    metric_axis(axes, first["metric"], first["task"], bool(first["higher_is_better"]))


def _dense(axes: Axes, row: pd.Series) -> None:
    axes.axhline(row["value"], color=DENSE.colour, linewidth=1)
    axes.axhspan(row["low"], row["high"], color=DENSE.colour, alpha=0.08, linewidth=0)
    axes.plot([0], [row["value"]], color=DENSE.colour, marker=DENSE.marker, markersize=11)
