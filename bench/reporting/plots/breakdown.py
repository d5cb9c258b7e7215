"""Stacked bars of a cost's parts, one bar per run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.errors import UserError
from bench.records import Cost, Record
from bench.reporting.plots.points import cost_name, refuse_mixed_scopes
from bench.reporting.plots.style import (
    COLOURS,
    HATCHES,
    INK,
    add_legend,
    draw_panels,
    label_unit_axis,
    tint,
)
from bench.reporting.record_numbers import benchmark_names, model_text

WALL = "wall"
METHODS_REST = "methods, the rest"
RUN_PHASES = frozenset({METHODS_REST, "scoring", "loading the model", "counting costs"})
"""Phases of every run; all other phases are parts of a method."""
BAR_HEIGHT, FRAME_HEIGHT, LETTER_WIDTH = 0.32, 1.1, 0.075
"""Inches: height of a bar, height of everything around the bars, and width of a label's letter."""


class PartFill(NamedTuple):
    """Fill of a part: colour and hatch."""

    colour: tuple[float, float, float]
    hatch: str


def cost_parts(records: Sequence[Record], cost: str, scope: str | None = None) -> pd.DataFrame:
    """Return one row per run and per part of one of its costs.

    Parts must add up to the cost, which excludes the percentiles of a measured time. The parts of
    `wall` are the phases of the run.

    Raises:
        UserError: no run has parts of this cost, or it was recorded for several shapes.
    """
    scored = benchmark_names(records)
    rows = [
        {
            "run": record.id,
            "model": model_text(record),
            "benchmark": scored[record.id],
            "label": f"{record.label} ({record.id[:8]})",
            "part": part,
            "value": value,
            "unit": unit,
            "cost_name": name,
            "scope": own,
        }
        for record in records
        for name, own, unit, part, value in _parts(record, cost, scope)
    ]
    if not rows:
        known = {c.quantity for r in records for c in r.costs if _adds_up(c)} | {WALL}
        listed = ", ".join(sorted(known))
        raise UserError(f"--cost {cost}: no run records parts of it; choose one of {listed}")
    frame = pd.DataFrame(rows)
    refuse_mixed_scopes(frame, cost)
    return frame


def draw_breakdown(frame: pd.DataFrame) -> Figure:
    """Draw one stacked bar per run; parts differ in colour and hatch."""
    names = list(dict.fromkeys(frame[frame["value"] > 0]["part"]))
    fills = {
        name: PartFill(tint(COLOURS[i % len(COLOURS)]), HATCHES[i % len(HATCHES)])
        for i, name in enumerate(names)
    }
    figure, axes = draw_panels(frame, lambda axes, rows: _draw_bars(axes, rows, fills))
    most = int(frame.groupby(["model", "benchmark"])["run"].nunique().max())
    figure.set_figheight(FRAME_HEIGHT + BAR_HEIGHT * most)
    # The labels of the bars are beside the panel, which keeps the width that its title needs.
    beside = frame.groupby(["model", "benchmark"], sort=False)["label"].agg(
        lambda x: x.str.len().max()
    )
    figure.set_figwidth(figure.get_figwidth() + LETTER_WIDTH * int(beside.sum()))
    for each in axes:
        # All panels have the limits of the fullest one, so that bars are equally thick. Upper and
        # lower are swapped to put the first run on top.
        each.set_ylim(most - 0.5, -0.5)
    handles = [
        Patch(facecolor=fill.colour, hatch=fill.hatch, edgecolor=INK, linewidth=0.4, label=name)
        for name, fill in fills.items()
    ]
    add_legend(figure, handles)
    return figure


def _draw_bars(axes: Axes, group: pd.DataFrame, fills: dict[str, PartFill]) -> None:
    wide = group.pivot_table(index="label", columns="part", values="value", sort=False)
    left = pd.Series(0.0, index=wide.index)
    for part in (name for name in fills if name in wide):
        length = wide[part].fillna(0.0)
        axes.barh(
            wide.index, length, left=left, height=0.7, facecolor=fills[part].colour,
            hatch=fills[part].hatch, edgecolor=INK, linewidth=0.4,
        )  # fmt: skip
        left += length
    axes.grid(visible=False, axis="y")
    first = group.iloc[0]
    label_unit_axis(axes, first["cost_name"], first["unit"], left.max())


def _parts(
    record: Record, quantity: str, scope: str | None
) -> Iterator[tuple[str, str, str, str, float]]:
    """Yield name of the cost, its scope, unit, part and value."""
    if quantity == WALL:
        for part, seconds in _phase_seconds(record).items():
            yield "time of the run", WALL, "s", part, seconds
        return
    same = (c for c in record.headline_costs if c.quantity == quantity)
    fitting = (cost for cost in same if scope in (None, cost.scope))
    # `parts` is also used for percentiles and bounds, which cannot be stacked.
    found = next(filter(_adds_up, fitting), None)
    if found is not None:
        name = cost_name(found)
        for part, value in found.parts.items():
            yield name, found.scope, found.unit, part.replace("_", " "), value


def _adds_up(cost: Cost) -> bool:
    # A tolerance of 1 % for parts that were rounded or timed separately.
    return bool(cost.parts) and math.isclose(sum(cost.parts.values()), cost.value, rel_tol=0.01)


def _phase_seconds(record: Record) -> dict[str, float]:
    """Return the seconds of a run's disjoint phases.

    Phases of different tasks are added under one name, and so are those of different methods.
    """
    found: dict[str, float] = defaultdict(float)
    for cost in record.costs:
        if cost.quantity == WALL:
            name = cost.scope.removeprefix("phase ")
            scoring = name.startswith(f"{record.model.name} on ")
            applying = name.startswith("applying ")
            found["scoring" if scoring else METHODS_REST if applying else name] += cost.value
    # Phases inside a method are also part of the method's own phase, from which they are
    # subtracted so that they do not count twice.
    within = sum(value for name, value in found.items() if name not in RUN_PHASES)
    if METHODS_REST in found:
        found[METHODS_REST] = max(0.0, found[METHODS_REST] - within)
    return dict(found)
