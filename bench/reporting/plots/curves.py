"""Curves of a headline metric against a knob of the methods, and training histories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.errors import UserError
from bench.records import Record
from bench.reporting.plots.points import series_names
from bench.reporting.plots.style import (
    DENSE_STYLE,
    INK,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    SeriesStyle,
    add_legend,
    draw_panels,
    family_handles,
    label_metric_axis,
    series_styles,
)


def summarize_families(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per family and amount: the mean of its runs and an error bar.

    The bar of a single run is its 95 % interval. With several runs (seeds) the bar is from their
    minimum to their maximum, and `runs` is their number.
    """
    rows = []
    keys = ["model", "benchmark", "family", "amount"]
    # dropna=False, because the dense model has no amount and pandas would drop its group.
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


def draw_curves(frame: pd.DataFrame, knob: str) -> Figure:
    """Draw the rows of `summarize_families`; the dense model is a horizontal line with a band."""
    # A panel without a run that has the knob would show only the dense line.
    panels = frame.groupby(["model", "benchmark"])["amount"]
    frame = frame[panels.transform(lambda amounts: amounts.notna().any()).astype(bool)]
    # Families without a value of the knob are not drawn and must not use a style.
    with_amount = frame[frame["amount"].notna() | (frame["family"] == "dense")]
    families = series_styles(with_amount["family"])
    figure, _ = draw_panels(frame, lambda axes, rows: _draw_curve_panel(axes, rows, families, knob))
    add_legend(figure, family_handles(families, joined=True))
    return figure


def _draw_curve_panel(
    axes: Axes, group: pd.DataFrame, families: dict[str, SeriesStyle], knob: str
) -> None:
    for family, line in group.groupby("family", sort=False):
        if family == "dense":
            _draw_dense(axes, line.iloc[0], knob)
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
    higher = bool(first["higher_is_better"])
    label_metric_axis(axes, first["metric"], first["task"], higher_is_better=higher)


DENSE_AT_ZERO = frozenset({"ratio"})
"""Knobs for which 0 is the dense model; others (`keep`, `bits`) have no such value."""


def _draw_dense(axes: Axes, row: pd.Series, knob: str) -> None:
    axes.axhline(row["value"], color=DENSE_STYLE.colour, linewidth=1)
    axes.axhspan(row["low"], row["high"], color=DENSE_STYLE.colour, alpha=0.08, linewidth=0)
    if knob.rpartition(".")[2] in DENSE_AT_ZERO:
        axes.plot(
            [0], [row["value"]], color=DENSE_STYLE.colour, marker=DENSE_STYLE.marker, markersize=11
        )


STEP_KEYS = ("epoch", "step")
HISTORY_QUANTITIES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "alive": "groups alive",
    "fractional": "groups between kept and removed",
}
"""Quantities to draw if a history has them, in this order, with their titles."""


def training_histories(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per run, step and quantity reported during training.

    Runs that differ only in their seed have the same `series`.

    Raises:
        UserError: no run has a method that trains.
    """
    named = series_names(records)
    rows = [
        {"run": record.id, "series": named[record.id], **line}
        for record in records
        for line in _history_rows(record)
    ]
    if not rows:
        raise UserError("none of the runs has a method that trains: there is no history to draw")
    return pd.DataFrame(rows)


def _history_rows(record: Record) -> Iterator[dict[str, object]]:
    for method in record.methods:
        history = method.report.get("history", [])
        for line in history:
            time = next((step for step in STEP_KEYS if step in line), None)
            for name in HISTORY_QUANTITIES:
                if time is not None and line.get(name) is not None:
                    budget = history[-1].get("k") if name == "alive" else None
                    yield {
                        "quantity": name, "time": time, "at": line[time], "value": line[name],
                        "budget": budget,
                    }  # fmt: skip
        # Short fine-tunings report a plain list with one loss per step. Other methods may use this
        # key for something else.
        losses = method.report.get("losses")
        if not isinstance(losses, list) or not all(isinstance(x, int | float) for x in losses):
            continue
        for step, loss in enumerate(losses, start=1):
            yield {
                "quantity": "loss", "time": "step", "at": step, "value": loss, "budget": None
            }  # fmt: skip


def draw_training(frame: pd.DataFrame) -> Figure:
    """Draw a panel per quantity, with a line per series: the mean of its seeds, and their range.

    A budget of groups is a dotted line.
    """
    quantities = [name for name in HISTORY_QUANTITIES if (frame["quantity"] == name).any()]
    figure = Figure(figsize=(PANEL_WIDTH * len(quantities), PANEL_HEIGHT), layout="constrained")
    styles = series_styles(frame["series"])
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        rows = frame[frame["quantity"] == quantity]
        for name, runs in rows.groupby("series", sort=False):
            look = styles[str(name)]
            line = runs.groupby("at")["value"].agg(["mean", "min", "max"])
            axes.plot(
                line.index, line["mean"], color=look.colour, linestyle=look.line,
                # About eight markers per line identify it in greyscale without hiding it.
                marker=look.marker, markevery=max(1, len(line) // 8), markersize=4, label=name,
            )  # fmt: skip
            if runs["run"].nunique() > 1:
                axes.fill_between(
                    line.index, line["min"], line["max"], color=look.colour, alpha=0.12, linewidth=0
                )
        for budget in rows["budget"].dropna().unique():
            axes.axhline(budget, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xlabel(str(rows["time"].iloc[0]))
        axes.set_title(HISTORY_QUANTITIES[quantity], loc="left")
    # A series need not be in every panel.
    add_legend(figure, family_handles(styles, joined=True))
    return figure
