"""Training curves of methods that train, from the history in their reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.errors import UserError
from bench.records import Record
from bench.reporting.plots.axes import HEIGHT, WIDTH, legend
from bench.reporting.plots.style import looks

STEPS = ("epoch", "step")
SHOWN = ("loss", "accuracy", "alive")
"""Drawn quantities, in this order, if a history has them."""


def histories(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row per run, step and quantity reported during training.

    Raises:
        UserError: none of the runs has trained anything.
    """
    rows = [
        {"run": record.id, "label": f"{record.label} ({record.id[:8]})", **line}
        for record in records
        for line in _lines(record)
    ]
    if not rows:
        raise UserError("none of the runs has a method that trains: there is no history to draw")
    return pd.DataFrame(rows)


def _lines(record: Record) -> Iterator[dict[str, Any]]:
    for method in record.methods:
        for line in method.report.get("history", []):
            time = next((step for step in STEPS if step in line), None)
            for name in SHOWN:
                if time is not None and line.get(name) is not None:
                    yield {"quantity": name, "time": time, "at": line[time], "value": line[name]}
        # Short fine-tunings report a bare list with one loss per step.
        for step, loss in enumerate(method.report.get("losses", []), start=1):
            yield {"quantity": "loss", "time": "step", "at": step, "value": loss}


def draw(frame: pd.DataFrame) -> Figure:
    """Draw one panel per quantity and one line per run."""
    quantities = [name for name in SHOWN if (frame["quantity"] == name).any()]
    figure = Figure(figsize=(WIDTH * len(quantities), HEIGHT), layout="constrained")
    styles = looks(frame["label"])
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        shown = frame[frame["quantity"] == quantity]
        for label, line in shown.groupby("label", sort=False):
            look = styles[str(label)]
            axes.plot(
                line["at"], line["value"], color=look.colour, linestyle=look.line,
                # About eight markers per line identify it in greyscale without hiding it.
                marker=look.marker, markevery=max(1, len(line) // 8), markersize=4, label=label,
            )  # fmt: skip
        axes.set_xlabel(str(shown["time"].iloc[0]))
        axes.set_title(quantity if quantity != "alive" else "groups alive", loc="left")
    legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure
